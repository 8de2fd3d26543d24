"""Dispatch: the tokens of a forward pass go to the experts of their organs, and what comes back is added up."""
