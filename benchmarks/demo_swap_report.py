"""What `benchmarks.demo_swap` found, as a table, as JSON and as two pictures."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.demo_swap_callers import LEFT_OUT, ORGAN, Answered, Heard
from benchmarks.drawing import new_figure, save_figure
from benchmarks.measure_table import measure_table
from benchmarks.timings import nearest_rank

MOST_BEFORE, LEAST_AFTER = 0.2, 0.7


@dataclass(frozen=True)
class Findings:
    """One run.

    Attributes:
        versions: of the experts before and after.
        before: every question's answer before the swap, without other load.
        after: the same questions' answers after it.
        heard: the clients' results during the swap.
        moments: state of the rollout → when it was in it first, on the monotonic clock.
        returned: when the command that promoted returned.
        history: what Control notes of the swap.
        seconds: how long all of it took.
    """

    versions: tuple[str, str]
    before: Sequence[Answered]
    after: Sequence[Answered]
    heard: Heard
    moments: Mapping[str, float]
    returned: float
    history: Sequence[Mapping[str, Any]]
    seconds: float

    @cached_property
    def found_before(self) -> tuple[int, int]:
        """Of the class that was left out: the numbers found and requested."""
        return _found(self.before)

    @cached_property
    def found_after(self) -> tuple[int, int]:
        """Of the class that was left out: the numbers found and requested."""
        return _found(self.after)

    @cached_property
    def others(self) -> int:
        """Questions about other organs."""
        return sum(answer.question.organ != ORGAN for answer in self.before)

    @cached_property
    def changed(self) -> list[str]:
        """Answers about other organs that differ between before and after."""
        return [
            f"{old.question.organ}/{old.question.class_name} {old.question.language}"
            for old, new in zip(self.before, self.after, strict=True)
            if old.question.organ != ORGAN and old.output != new.output
        ]

    @cached_property
    def mixed(self) -> list[str]:
        """Answers under load that are not the ones that their version gives without load."""
        alone = {(answer.question.number, answer.version): answer.output for answer in (*self.before, *self.after)}
        return [
            f"{answer.question.organ}/{answer.question.class_name} by {answer.version or 'other experts'}"
            for answer in self.heard.answers
            if alone.get((answer.question.number, answer.version)) != answer.output
        ]

    @cached_property
    def late(self) -> int:
        """Requests that began with the version before after the command that promoted had returned."""
        return sum(answer.version == self.versions[0] and answer.began > self.returned for answer in self.heard.answers)

    @property
    def is_as_promised(self) -> bool:
        """Whether every target was reached."""
        (before, asked), (after, again) = self.found_before, self.found_after
        return (
            before <= MOST_BEFORE * asked
            and after >= LEAST_AFTER * again
            and not (self.changed or self.mixed or self.heard.failures or self.late)
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "versions": list(self.versions),
            "recall_before": {"found": self.found_before[0], "asked": self.found_before[1]},
            "recall_after": {"found": self.found_after[0], "asked": self.found_after[1]},
            "classes": {
                name: {"asked": asked, "before": before, "after": after}
                for name, (asked, before, after) in self.by_class().items()
            },
            "other_organs": {"asked": self.others, "changed": self.changed},
            "under_load": {
                "answers": len(self.heard.answers),
                "versions": dict(Counter(a.version for a in self.heard.answers if a.version)),
                "failures": self.heard.failures,
                "mixed": self.mixed,
                "began_on_the_version_before_after_promotion": self.late,
            },
            "history": list(self.history),
            "seconds": self.seconds,
            "as_promised": self.is_as_promised,
        }

    def by_class(self) -> dict[str, tuple[int, int, int]]:
        """Class of the breast → requested, found before, found after."""
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for old, new in zip(self.before, self.after, strict=True):
            if old.question.organ == ORGAN:
                row = counts[old.question.class_name]
                row[0] += 1
                row[1] += old.is_found
                row[2] += new.is_found
        return {name: (asked, before, after) for name, (asked, before, after) in sorted(counts.items())}


def _found(answers: Sequence[Answered]) -> tuple[int, int]:
    asked = [answer for answer in answers if answer.question.is_left_out]
    return sum(answer.is_found for answer in asked), len(asked)


def example(found: Findings) -> tuple[bytes, list[str]] | None:
    """A picture of the class that was left out, and lines of Markdown with what each version wrote about it.

    The first that the version after got right; None where there is none.
    """
    for old, new in zip(found.before, found.after, strict=True):
        if old.question.is_left_out and new.is_found:
            lines = [f"- {found.versions[0]}: {old.text}", f"- {found.versions[1]}: {new.text}"]
            return old.question.png, lines
    return None


def table(found: Findings) -> list[str]:
    """The measures as lines of Markdown."""
    before, after = found.versions
    rows = [
        (f"recall of {ORGAN}/{LEFT_OUT} by {before}", _share(*found.found_before), f"≤ {MOST_BEFORE}"),
        (f"recall of {ORGAN}/{LEFT_OUT} by {after}", _share(*found.found_after), f"≥ {LEAST_AFTER}"),
        (f"answers about other organs that changed, of {found.others}", str(len(found.changed)), "0"),
        (
            f"failed requests under load, of {len(found.heard.answers) + len(found.heard.failures)}",
            str(len(found.heard.failures)),
            "0",
        ),
        ("answers under load that are not their version's own", str(len(found.mixed)), "0"),
        (f"requests that began with {before} after the promotion", str(found.late), "0"),
        ("the whole demonstration, s", f"{found.seconds:.0f}", "≤ 180"),
    ]
    return measure_table(rows)


def _interval(found: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    interval = binomtest(found, asked).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _share(found: int, asked: int) -> str:
    low, high = _interval(found, asked)
    return f"{found / asked:.2f} ({found} of {asked}; 95 %: {low:.2f} to {high:.2f})"


def plot_recall(found: Findings, path: Path) -> None:
    """What each class of the swapped organ gained, with 95 % intervals, and how many answers of others changed."""
    figure = new_figure(2, figsize=(11, 4), width_ratios=[3, 2])
    classes, organs = figure.axes
    counts = found.by_class()
    for offset, column, version in ((-0.2, 1, found.versions[0]), (0.2, 2, found.versions[1])):
        shares = [row[column] / row[0] for row in counts.values()]
        limits = [_interval(row[column], row[0]) for row in counts.values()]
        below = [share - low for share, (low, _) in zip(shares, limits, strict=True)]
        above = [high - share for share, (_, high) in zip(shares, limits, strict=True)]
        places = [place + offset for place in range(len(counts))]
        classes.bar(places, shares, 0.38, yerr=[below, above], capsize=3, label=f"{ORGAN} {version}")
    labels = [name.replace("_", "\n") + f"\n(n = {row[0]})" for name, row in counts.items()]
    classes.set_xticks(range(len(counts)), labels, fontsize="small")
    classes.set_ylim(0, 1.05)
    classes.set_ylabel("reports that name the class")
    classes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    asked: Counter[str] = Counter(answer.question.organ for answer in found.before)
    changed: Counter[str] = Counter(
        old.question.organ for old, new in zip(found.before, found.after, strict=True) if old.output != new.output
    )
    names = sorted(asked)
    organs.barh(names, [asked[name] for name in names], color="0.88", label="asked")
    organs.barh(names, [changed[name] for name in names], color="C3", label="changed by the swap")
    for place, name in enumerate(names):
        organs.text(asked[name], place, f" {changed[name]} of {asked[name]}", va="center", fontsize="small")
    organs.set_xlim(0, max(asked.values()) * 1.25)
    organs.set_xlabel("answers, compared word for word")
    organs.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    save_figure(figure, path)


def plot_swap(found: Findings, path: Path) -> None:
    """When which version answered, and the pauses of all callers meanwhile."""
    figure = new_figure(rows=2, figsize=(11, 5), sharex=True)
    who, pauses = figure.axes
    start = min(answer.began for answer in found.heard.answers)
    rows = {found.versions[0]: 1, found.versions[1]: 2, "": 0}
    for version, row in rows.items():
        began = [answer.began - start for answer in found.heard.answers if answer.version == version]
        who.scatter(began, [row] * len(began), s=14, alpha=0.6, color=f"C{(row + 2) % 3}")
    who.set_yticks(list(rows.values()), [f"{ORGAN} {name}" if name else "other organs" for name in rows])
    who.set_ylim(-0.5, 2.5)
    who.set_title(f"Each point is a request, where it began; {len(found.heard.failures)} failed", fontsize="medium")
    gaps = [
        (end - start, (end - begin) * 1e3)
        for answer in found.heard.answers
        for begin, end in zip(answer.times[:-1], answer.times[1:], strict=True)
    ]
    pauses.scatter([moment for moment, _ in gaps], [gap for _, gap in gaps], s=3, alpha=0.4, color="0.3")
    p99 = nearest_rank([gap for _, gap in gaps], 99)
    pauses.axhline(
        p99, color="gray", linestyle=":", label=f"p50 {statistics.median(g for _, g in gaps):.0f}, p99 {p99:.0f} ms"
    )
    pauses.set_yscale("log")
    # Pieces of text that arrive together are no pauses.
    pauses.set_ylim(bottom=1)
    pauses.set_ylabel("pause within an answer, ms")
    pauses.set_xlabel("s")
    pauses.legend(fontsize="small", loc="upper right")
    for axis in figure.axes:
        for name, moment in found.moments.items():
            axis.axvline(moment - start, color="C3", linestyle="--", linewidth=1)
            if axis is who:
                axis.text(moment - start, 2.42, f" {name}", fontsize="small", va="top", color="C3")
    save_figure(figure, path)
