"""Data to train and to evaluate with."""
