"""The expert kernels, behind one interface."""
