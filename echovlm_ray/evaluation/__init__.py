"""Evaluation: asks a model a dataset's questions and scores its answers."""
