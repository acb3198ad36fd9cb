"""Evaluation: tasks, metrics, the linear probe, the run that compares a model with its float baseline, and gates."""
