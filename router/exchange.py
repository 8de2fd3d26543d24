"""What the dispatcher needs of a place where experts are computed: in this process, or behind gRPC."""

from typing import Protocol

import torch

from router.errors import ExpertsUnavailableError


class Exchange(Protocol):
    """Tokens that were handed to an organ's experts."""

    def result(self) -> torch.Tensor:
        """Waits for the weighted sum over the group's experts: tokens × hidden, in the dtype that was sent.

        Raises:
            ExpertsUnavailableError: no replica answered; the same tokens may be sent again later.
            ExpertsFailedError: the experts cannot compute this.
        """
        ...


class ExpertPlacement(Protocol):
    """Where the experts of all organs are."""

    def send(
        self,
        organ: str,
        bundle_digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> Exchange:
        """Starts an exchange and returns without waiting for its result.

        Args:
            organ: whose experts.
            bundle_digest: which version of them.
            layer: the decoder layer, from 0.
            x_TD: tokens × hidden.
            expert_index_TK: int32, from 0; `NO_EXPERT` where the group has no part in the pair.
            weight_TK: in x's dtype.

        Raises:
            ExpertsUnavailableError: no replica can be reached now.
        """
        ...

    def unavailable(self, organ: str) -> ExpertsUnavailableError | None:
        """Why an exchange with the organ would fail at once, or None; never waits, and starts connecting."""
        ...

    def close(self) -> None:
        """Gives back connections and threads."""
        ...
