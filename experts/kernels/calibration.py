"""Measures which of several kernels is faster for which number of pairs, and stores the result."""

import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from experts.kernels.base import ExpertWeights, PreparedExperts
from experts.private_folder import user_folder

_LOG = logging.getLogger(__name__)

# Pairs of one call: from one decoded token to a long prompt.
PROBE_PAIRS = (2, 16, 64, 256, 1024, 4096)
_TOP_K = 2
_REPETITIONS = 5
# A second kernel costs memory, so it must improve the worst probe by this factor.
_WORTH_A_SECOND = 1.02

# Kernel → seconds at each number of pairs.
Timings = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True, slots=True)
class Plan:
    """`small` computes up to `small_pairs` pairs, `large` more. They may be the same."""

    small: str
    small_pairs: int
    large: str

    def __str__(self) -> str:
        """For logs and status."""
        return (
            self.large
            if self.small == self.large
            else f"{self.small} up to {self.small_pairs} pairs, then {self.large}"
        )


def time_kernel(
    prepared: PreparedExperts, weights: ExpertWeights, pairs: Iterable[int] = PROBE_PAIRS
) -> dict[int, float]:
    """Median seconds of a call at each number of pairs, evenly spread over the experts."""
    timings = {}
    top_k = min(_TOP_K, weights.num_experts)
    for count in pairs:
        tokens = max(1, count // top_k)
        generator = torch.Generator().manual_seed(count)
        x_TD = torch.randn((tokens, weights.hidden_size), generator=generator).to(weights.device, weights.dtype)
        index_TK = torch.arange(tokens * top_k).view(tokens, top_k) % weights.num_experts
        weight_TK = torch.full((tokens, top_k), 1 / top_k).to(weights.device, weights.dtype)
        index_TK = index_TK.to(weights.device, torch.int32)

        def call(x: torch.Tensor = x_TD, index: torch.Tensor = index_TK, weight: torch.Tensor = weight_TK) -> None:
            prepared.forward(x, index, weight)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)

        # The first call may compile.
        call()
        timings[count] = statistics.median(_seconds(call) for _ in range(_REPETITIONS))
    return timings


def choose(timings: Timings) -> Plan:
    """The plan whose worst ratio to the fastest kernel, over all probes, is the smallest.

    Raises:
        ValueError: there is no kernel.
    """
    if not timings:
        raise ValueError("there is no kernel to choose from")
    pairs = sorted(next(iter(timings.values())))
    best = {count: min(of_kernel[count] for of_kernel in timings.values()) for count in pairs}

    def worst_ratio(plan: Plan) -> float:
        return max(
            timings[plan.small if count <= plan.small_pairs else plan.large][count] / best[count] for count in pairs
        )

    alone = min((Plan(name, 0, name) for name in timings), key=worst_ratio)
    two = [
        Plan(small, count, large) for small in timings for large in timings for count in pairs[:-1] if small != large
    ]
    if not two:
        return alone
    best_two = min(two, key=worst_ratio)
    return best_two if worst_ratio(best_two) * _WORTH_A_SECOND < worst_ratio(alone) else alone


class PlanFile:
    """Plans by key in a JSON file. An unreadable file is logged, ignored and written again."""

    def __init__(self, path: Path | None) -> None:
        """`path` is the file; with None nothing is stored."""
        self._path = path

    def read(self, key: str, candidates: Iterable[str]) -> Plan | None:
        """The plan of a key, if its kernels are among these candidates."""
        entry = self._entries().get(key)
        if entry is None:
            return None
        known = set(candidates)
        match entry:
            case [str(small), int(small_pairs), str(large)] if {small, large} <= known:
                return Plan(small, small_pairs, large)
        _LOG.warning("the plan of %r in %s cannot be used; calibrating again", key, self._path)
        return None

    def write(self, key: str, plan: Plan) -> None:
        """Adds a plan atomically. If the folder is not writable, the next process measures again."""
        if self._path is None:
            return
        entries = {**self._entries(), key: [plan.small, plan.small_pairs, plan.large]}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(entries, file, indent=1, sort_keys=True)
                os.replace(name, self._path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            _LOG.warning("the calibration of kernels is not kept in %s: %s", self._path, error)

    def _entries(self) -> dict[str, object]:
        if self._path is None:
            return {}
        try:
            entries = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _LOG.warning("the calibration of kernels in %s cannot be read: %s", self._path, error)
            return {}
        if not isinstance(entries, dict):
            _LOG.warning("the calibration of kernels in %s is not an object; it is passed over", self._path)
            return {}
        return entries


def default_plan_file() -> Path:
    """The default file for plans: below `XDG_CACHE_HOME`, by default `~/.cache`."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "echovlm-ray" / "kernels.json"


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
