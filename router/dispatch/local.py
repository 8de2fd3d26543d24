"""Experts in the router's process: the expert groups are called directly."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from experts.errors import BundleNotResidentError
from experts.group import ExpertGroup
from router.errors import ExpertsFailedError, ExpertsUnavailableError


@dataclass(slots=True)
class CompletedCall:
    """An `ExpertCall` that has completed."""

    output_TD: torch.Tensor
    compute_s: float

    def result(self) -> torch.Tensor:
        """The output; see `ExpertCall.result`."""
        return self.output_TD


class LocalExperts:
    """An `ExpertPlacement` of groups in this process; a call is computed while it is sent.

    Attributes:
        groups: organ → its group.
    """

    def __init__(self, groups: Mapping[str, ExpertGroup]) -> None:
        """`groups` maps organs to groups that have loaded the bundles in use."""
        self.groups = dict(groups)

    def send(
        self,
        organ: str,
        bundle_digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_RK: torch.Tensor,
        weight_RK: torch.Tensor,
        row_R: torch.Tensor | None = None,
    ) -> CompletedCall:
        """Computes the call; see `ExpertPlacement.send`."""
        if (reason := self.unavailable(organ)) is not None:
            raise reason
        try:
            x_RD = x_TD if row_R is None else x_TD[row_R]
            started = time.perf_counter()
            output = self.groups[organ].forward(bundle_digest, layer, x_RD, expert_index_RK.to(torch.int32), weight_RK)
        except BundleNotResidentError as error:
            raise ExpertsUnavailableError(organ, str(error)) from error
        except Exception as error:
            raise ExpertsFailedError(organ, str(error)) from error
        return CompletedCall(output, time.perf_counter() - started)

    def unavailable(self, organ: str) -> ExpertsUnavailableError | None:
        """An error when there is no group of that organ."""
        if organ in self.groups:
            return None
        return ExpertsUnavailableError(organ, "this router was started without its expert group")

    def close(self) -> None:
        """Does nothing."""
