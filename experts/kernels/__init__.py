"""The ways to compute experts, behind one interface."""
