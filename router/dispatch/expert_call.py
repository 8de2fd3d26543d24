"""The dispatcher's interface to a place where experts are computed: in this process, or behind gRPC."""

from typing import Protocol

import torch

from router.errors import ExpertsUnavailableError


class ExpertCall(Protocol):
    """Tokens that were handed to an organ's experts.

    Attributes:
        compute_s: seconds that the experts' kernel took, where it is known; 0 before.
    """

    compute_s: float

    def result(self) -> torch.Tensor:
        """Waits for the weighted sum over the group's experts: rows sent × hidden, in the dtype that was sent.

        It may share memory with what received it; that is kept for as long as the tensor is.

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
        expert_index_RK: torch.Tensor,
        weight_RK: torch.Tensor,
        row_R: torch.Tensor | None = None,
    ) -> ExpertCall:
        """Starts a call and returns without waiting for its result.

        Args:
            organ: whose experts.
            bundle_digest: which version of them.
            layer: the decoder layer, from 0.
            x_TD: tokens × hidden. Must not change before the result is there: it may have to be sent again.
            expert_index_RK: int32 or int64, from 0; `NO_EXPERT` where the group has no part in the pair.
            weight_RK: in x's dtype.
            row_R: which rows of x are sent, int64, on its device; None for all of them.

        Raises:
            ExpertsUnavailableError: no replica can be reached now.
        """
        ...

    def unavailable(self, organ: str) -> ExpertsUnavailableError | None:
        """Why a call of the organ would fail at once, or None; never waits, and starts connecting."""
        ...

    def close(self) -> None:
        """Closes connections and threads."""
        ...
