"""Experts in the router's own process: the same groups, called instead of reached."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from experts.errors import BundleNotResidentError
from experts.group import ExpertGroup
from router.errors import ExpertsFailedError, ExpertsUnavailableError


@dataclass(frozen=True, slots=True)
class _Computed:
    output_TD: torch.Tensor

    def result(self) -> torch.Tensor:
        return self.output_TD


class LocalExperts:
    """An `ExpertPlacement` of groups in this process; an exchange is computed while it is sent."""

    def __init__(self, groups: Mapping[str, ExpertGroup]) -> None:
        """`groups` maps organs to groups that have loaded the bundles in use."""
        self._groups = dict(groups)

    def send(
        self,
        organ: str,
        bundle_digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> _Computed:
        """Computes the exchange; see `ExpertPlacement.send`."""
        if (reason := self.unavailable(organ)) is not None:
            raise reason
        try:
            output = self._groups[organ].forward(bundle_digest, layer, x_TD, expert_index_TK, weight_TK)
        except BundleNotResidentError as error:
            raise ExpertsUnavailableError(organ, str(error)) from error
        except Exception as error:
            raise ExpertsFailedError(organ, str(error)) from error
        return _Computed(output)

    def unavailable(self, organ: str) -> ExpertsUnavailableError | None:
        """An error when there is no group of that organ."""
        if organ in self._groups:
            return None
        return ExpertsUnavailableError(organ, "this router was started without its expert group")

    def close(self) -> None:
        """Nothing to give back."""
