"""Speed, size and memory of models and of other engines, side by side: `qtool bench`.

Every engine lives in a process of its own (`worker.py`); a parent (`contest.py`) hands out turns, so that only one of
them computes at a time. This package stays light: a worker imports its engine's own packages and nothing else.
"""
