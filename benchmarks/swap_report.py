"""What `benchmarks.swaps` found, as a table, as JSON and as a picture."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.drawing import new_figure, save_figure
from benchmarks.measure_table import measure_table
from benchmarks.swap_operations import Swap
from benchmarks.swap_streams import Heard
from benchmarks.timings import nearest_rank

TARGET_GAP_RATIO, TARGET_PROMOTE_RATIO, TARGET_GROWTH = 1.2, 1.5, 0.05
TARGET_LAST_OLD_S = 0.25
# The memory of this part of the swaps, at the beginning and at the end, is left out and compared with the rest.
WARM_UP_PART = 0.1
MIB = 1024 * 1024
PHASES = {
    "verify": "of a swap, verifying the bundle in a process of its own",
    "load": "of a swap, loading it on the replicas",
    "canary": "of a swap, half of the requests on the candidate",
    "switch": "of a swap, from the decision to the old version's memory back",
}


@dataclass(frozen=True)
class Findings:
    """One run.

    Attributes:
        organ: of the swapped experts.
        heard: all answers under load.
        failures: of requests under load.
        alone: organ, version, prompt → the answer when there is no other request.
        swaps: all of them, in order.
        quiet: the intervals under the same load without swaps.
        memory: part → its resident bytes after every swap.
        bundle_bytes: of one version.
        read_s: how long it takes to read and checksum it, measured before every swap, under the same load.
    """

    organ: str
    heard: Sequence[Heard]
    failures: Sequence[str]
    alone: Mapping[tuple[str, str, str], str]
    swaps: Sequence[Swap]
    quiet: Sequence[tuple[float, float]]
    memory: Mapping[str, Sequence[int]]
    bundle_bytes: int
    read_s: Sequence[float]

    @property
    def mismatches(self) -> int:
        """Answers that differ from their version's answer without load."""
        return sum(sum(kind["instead"].values()) for kind in self.mismatch_kinds)

    @cached_property
    def mismatch_kinds(self) -> list[dict[str, Any]]:
        """For each question with a different answer under load: the question, the answer without load, and those under
        load.
        """
        instead: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
        asked: Counter[tuple[str, str, str]] = Counter()
        for heard in self.heard:
            key = (heard.asked.organ, heard.version, heard.asked.prompt)
            asked[key] += 1
            if self.alone.get(key) != heard.text:
                instead[key][heard.text] += 1
        return [
            {
                "organ": key[0],
                "version": key[1],
                "prompt": key[2],
                "asked": asked[key],
                "alone": self.alone.get(key),
                "instead": dict(texts),
            }
            for key, texts in instead.items()
        ]

    @cached_property
    def gaps_during_ms(self) -> list[float]:
        """Pauses within answers that overlap a swap."""
        return self._overlapping([(swap.began, swap.ended) for swap in self.swaps])

    @cached_property
    def gaps_without_ms(self) -> list[float]:
        """Pauses within answers under the same load without a swap."""
        return [
            (end - begin) * 1e3
            for heard in self.heard
            for begin, end in heard.gaps
            if any(begin >= first and end <= last for first, last in self.quiet)
        ]

    @cached_property
    def phases(self) -> Mapping[str, tuple[list[float], list[float]]]:
        """Phase of a swap → its durations in seconds, and the pauses in ms that overlap it.

        Only those into which some pause fell.
        """
        intervals: dict[str, list[tuple[float, float]]] = {}
        for swap in self.swaps:
            for phase, interval in swap.phases.items():
                intervals.setdefault(phase, []).append(interval)
        found = {
            phase: ([end - begin for begin, end in each], self._overlapping(each)) for phase, each in intervals.items()
        }
        return {phase: (seconds, gaps) for phase, (seconds, gaps) in found.items() if gaps}

    @property
    def gap_ratio(self) -> float:
        """p99 during swaps ÷ p99 without."""
        return nearest_rank(self.gaps_during_ms, 99) / nearest_rank(self.gaps_without_ms, 99)

    def served_s(self, *, prepared: bool) -> list[float]:
        """From the decision until requests got the new version, where it was, or was not, resident already."""
        return [swap.served_s for swap in self.swaps if swap.served_s is not None and swap.prepared == prepared]

    @cached_property
    def last_old_s(self) -> list[float]:
        """For each promotion: from the command to the last request that began and got the version before."""
        return [
            max((began - swap.decided for began in self._on_replaced(swap)), default=0.0)
            for swap in self.swaps
            if swap.prepared and swap.decided is not None
        ]

    @cached_property
    def old_after_return(self) -> int:
        """Requests that began after a promotion's command had returned, and got the version before."""
        return sum(
            began > swap.returned
            for swap in self.swaps
            if swap.prepared and swap.returned is not None
            for began in self._on_replaced(swap)
        )

    def _on_replaced(self, swap: Swap) -> list[float]:
        """When requests began that got the version before a swap, from its decision to the next swap."""
        assert swap.decided is not None
        following = min((other.began for other in self.swaps if other.began > swap.began), default=float("inf"))
        return [
            heard.began
            for heard in self.heard
            if heard.version == swap.replaced
            and heard.asked.organ == self.organ
            and swap.decided < heard.began < following
        ]

    def growth(self, part: str) -> float:
        """Resident memory at the end ÷ after the warm-up, less 1: medians over a tenth of the swaps each."""
        samples = self.memory[part]
        count = max(1, round(len(samples) * WARM_UP_PART))
        return statistics.median(samples[-count:]) / statistics.median(samples[count : 2 * count] or samples[:1]) - 1

    def _overlapping(self, intervals: Sequence[tuple[float, float]]) -> list[float]:
        return [
            (end - begin) * 1e3
            for heard in self.heard
            for begin, end in heard.gaps
            if any(begin < last and end > first for first, last in intervals)
        ]

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "answers": len(self.heard),
            "failures": list(self.failures),
            "mismatches": self.mismatches,
            "mismatch_kinds": self.mismatch_kinds,
            "swaps": dict(Counter(swap.kind for swap in self.swaps)),
            "gap_p50_ms": {
                "during": nearest_rank(self.gaps_during_ms, 50),
                "without": nearest_rank(self.gaps_without_ms, 50),
            },
            "gap_p99_ms": {
                "during": nearest_rank(self.gaps_during_ms, 99),
                "without": nearest_rank(self.gaps_without_ms, 99),
            },
            "gap_p99_ratio": self.gap_ratio,
            "bundle_bytes": self.bundle_bytes,
            "read_and_checksum_s": list(self.read_s),
            "last_request_on_the_version_before_s": self.last_old_s,
            "requests_on_the_version_before_after_promote_returned": self.old_after_return,
            "served_after_promote_s": self.served_s(prepared=True),
            "served_after_rollback_s": self.served_s(prepared=False),
            "phases": {
                phase: {"seconds": seconds, "gap_p99_ms": nearest_rank(gaps, 99)}
                for phase, (seconds, gaps) in self.phases.items()
            },
            "swap_s": [swap.ended - swap.began for swap in self.swaps],
            "memory_bytes": {part: list(samples) for part, samples in self.memory.items()},
            "memory_growth": {part: self.growth(part) for part in self.memory},
        }


def table(found: Findings) -> list[str]:
    """The measures as lines of Markdown."""
    read_ms = statistics.median(found.read_s) * 1e3
    rows: list[tuple[str, str, str]] = [
        (f"failed requests, of {len(found.heard) + len(found.failures)}", str(len(found.failures)), "0"),
        (
            f"answers that differ from their version's when run alone, of {len(found.heard)}",
            str(found.mismatches),
            "0",
        ),
    ]
    for percent in (50, 99):
        during, without = nearest_rank(found.gaps_during_ms, percent), nearest_rank(found.gaps_without_ms, percent)
        target = f"≤ {TARGET_GAP_RATIO}" if percent == 99 else ""
        text = f"pause within an answer, p{percent}: during swaps ÷ without, ms"
        rows.append((text, f"{during:.1f} ÷ {without:.1f} = {during / without:.2f}", target))
    rows.append((f"reading and checksumming the {found.bundle_bytes / MIB:.1f} MiB, ms", f"{read_ms:.0f}", ""))
    for times, text, has_target in (
        (found.served_s(prepared=True), "`promote` until requests get the new version, which is resident", True),
        (
            found.served_s(prepared=False),
            "`rollback` until requests get the version before, which is verified and loaded first",
            False,
        ),
    ):
        if times:
            median = statistics.median(times) * 1e3
            rows.append((f"{text}, ms, median and worst", f"{median:.0f}, {max(times) * 1e3:.0f}", ""))
            if has_target:
                ratio = f"{median / read_ms:.2f}, {max(times) * 1e3 / read_ms:.2f}"
                rows.append(("the same ÷ reading and checksumming once", ratio, f"≤ {TARGET_PROMOTE_RATIO}"))
                # It does not depend on a bundle's size, and reading does.
                least_mib = median / read_ms * found.bundle_bytes / MIB / TARGET_PROMOTE_RATIO
                rows.append(("bundles from which on the median meets that, MiB", f"{least_mib:.0f}", ""))
    if found.last_old_s:
        text = "`promote` until the last request that began on the version before, s, worst"
        rows.append((text, f"{max(found.last_old_s):.2f}", f"≤ {TARGET_LAST_OLD_S}"))
        text = "requests that began on the version before after `promote` had returned"
        rows.append((text, str(found.old_after_return), "0"))
    for phase, (seconds, gaps) in found.phases.items():
        value = f"{statistics.median(seconds):.2f}; {nearest_rank(gaps, 99):.1f}"
        rows.append((f"{PHASES[phase]}: s, median; p99 of the pauses meanwhile, ms", value, ""))
    whole = statistics.median(swap.ended - swap.began for swap in found.swaps)
    rows.append(
        ("a whole swap, from the first command to the old version's memory back, s, median", f"{whole:.1f}", "")
    )
    for part, samples in found.memory.items():
        text = f"resident memory of {part} at the end, MiB, and its growth since the first tenth of the swaps"
        target = f"≤ {TARGET_GROWTH:.0%}"
        rows.append((text, f"{samples[-1] / MIB:.0f}, {found.growth(part):+.1%}", target))
    return measure_table(rows)


def plot(found: Findings, title: str, path: Path) -> None:
    """Pauses over time with the swaps shaded, their distribution, and memory over the swaps."""
    figure = new_figure(3)
    over_time, distribution, memory = figure.axes
    began = min((swap.began for swap in found.swaps), default=0.0)
    points = [(end - began, (end - begin) * 1e3) for heard in found.heard for begin, end in heard.gaps]
    over_time.scatter([moment for moment, _ in points], [gap for _, gap in points], s=2, alpha=0.4)
    for swap in found.swaps:
        over_time.axvspan(swap.began - began, swap.ended - began, color="C1", alpha=0.15, linewidth=0)
    over_time.set_xlabel("s; shaded: a swap")
    over_time.set_ylabel("pause within an answer, ms")
    for gaps, label in ((found.gaps_without_ms, "without"), (found.gaps_during_ms, "during swaps")):
        ordered = sorted(gaps)
        part_above = [1 - index / len(ordered) for index in range(len(ordered))]
        distribution.plot(ordered, part_above, label=label)
    distribution.axhline(0.01, color="gray", linestyle=":", label="p99")
    distribution.set_yscale("log")
    distribution.set_xscale("log")
    distribution.set_xlabel("pause, ms")
    distribution.set_ylabel("part that is longer")
    distribution.legend(fontsize="small")
    for part, samples in found.memory.items():
        memory.plot(range(1, len(samples) + 1), [sample / MIB for sample in samples], label=part)
    memory.set_xlabel("swaps")
    memory.set_ylabel("resident memory, MiB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize="small")
    save_figure(figure, path, title)
