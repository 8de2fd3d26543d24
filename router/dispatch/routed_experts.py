"""The interface between a decoder layer and its routed experts."""

from typing import Protocol

import torch


class PendingExperts(Protocol):
    """Running expert calls, which overlap with the caller's work."""

    def result(self) -> torch.Tensor:
        """Waits for `Σ_k w_k · SwiGLU_k(x)`: tokens × hidden, in x's dtype."""
        ...


class RoutedExperts(Protocol):
    """Computes the routed experts of any layer for the tokens of one forward pass."""

    def begin(self, layer: int, x_TD: torch.Tensor) -> PendingExperts:
        """Computes the gate and starts the expert calls.

        Args:
            layer: the decoder layer, from 0.
            x_TD: tokens × hidden, after the post-attention norm.
        """
        ...
