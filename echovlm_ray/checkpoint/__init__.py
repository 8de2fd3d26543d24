"""Checkpoints on disk: the released layout, the split folder, and conversions between them."""
