"""Training: a whole model, or one organ's experts. See `docs/training.md`."""
