"""Evaluation: a dataset's questions asked of a model, and what its answers are worth."""
