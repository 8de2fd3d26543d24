"""The interface between a decoder layer and the place where its routed experts are computed."""

from typing import Protocol

import torch


class PendingExperts(Protocol):
    """Calls of experts that were begun: they compute while the caller does something else."""

    def result(self) -> torch.Tensor:
        """Waits, and returns `Σ_k w_k · SwiGLU_k(x)`: tokens × hidden, in x's dtype."""
        ...


class RoutedExperts(Protocol):
    """Computes the routed experts of any layer for the tokens of one forward pass."""

    def begin(self, layer: int, x_TD: torch.Tensor) -> PendingExperts:
        """Gates the tokens and starts their experts.

        Args:
            layer: the decoder layer, from 0.
            x_TD: tokens × hidden, after the post-attention norm.
        """
        ...
