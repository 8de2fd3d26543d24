"""Dispatch and combine: sends the tokens of a forward pass to the experts of their organs, and adds up the results."""
