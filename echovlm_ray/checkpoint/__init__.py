"""Checkpoints on disk: the released layout, the split folder, and the way between them."""
