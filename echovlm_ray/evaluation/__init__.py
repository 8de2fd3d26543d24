"""Evaluation: sends a dataset's questions to a model and scores its answers."""
