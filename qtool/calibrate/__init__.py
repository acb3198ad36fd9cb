"""Calibration: sentences become batches, observers see streams of activations, statistics are kept in a file.

Nothing here knows tasks or labels. Padding never reaches an observer.
"""
