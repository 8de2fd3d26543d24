"""The dispatcher's interface to the experts: in this process, or behind gRPC."""

from typing import Protocol

import torch

from router.errors import ExpertsUnavailableError


class ExpertCall(Protocol):
    """A call of an organ's experts.

    Attributes:
        compute_s: seconds that the experts' kernel took, where it is known; 0 before.
    """

    compute_s: float

    def result(self) -> torch.Tensor:
        """Waits for the weighted sum over the group's experts: rows × hidden, in the input's dtype.

        The tensor may be a view of shared memory, which stays reserved as long as the tensor exists.

        Raises:
            ExpertsUnavailableError: no replica answered; the call can be retried later.
            ExpertsFailedError: the experts cannot compute this call.
        """
        ...


class ExpertPlacement(Protocol):
    """The location of all organs' experts: sends calls to them."""

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
            organ: the organ.
            bundle_digest: the version of its experts.
            layer: the decoder layer, from 0.
            x_TD: tokens × hidden. Must not change before the result is available, because the call may be retried.
            expert_index_RK: int32 or int64, from 0; `NO_EXPERT` for pairs of other groups.
            weight_RK: in x's dtype.
            row_R: the rows of x to send, int64, on x's device; None for all rows.

        Raises:
            ExpertsUnavailableError: no replica can be reached now.
        """
        ...

    def unavailable(self, organ: str) -> ExpertsUnavailableError | None:
        """Why a call for the organ would fail now, or None. Does not block; starts connecting."""
        ...

    def close(self) -> None:
        """Closes connections and stops threads."""
        ...
