"""How tensors travel between processes."""
