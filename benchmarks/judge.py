"""How soon bad candidates are rolled back, and whether good ones ever are: `python -m benchmarks.judge`.

Simulates rollouts with the controller, the store and the judge that serve, and a clock that is moved; no system runs.
Good candidates go through all steps, the promotion and the watch after it, under loads, usual rates of failures and
shared outages that a seed draws. Bad ones are in a single step until they are rolled back. Writes
`benchmarks/results/judge.md`, `.json` and `.png`.
"""

import argparse
import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.drawing import check_drawing, new_figure, save_figure
from benchmarks.judge_simulation import Outcome, Traffic, simulation
from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from router.rollouts.settings import Mode, RolloutPlan, RolloutSettings, Step
from router.rollouts.states import State

RESULT = Path(__file__).resolve().parent / "results" / "judge.md"
SETTINGS = RolloutSettings(watch_after_promotion_s=120)
# The steps of a good candidate: its requests are counted, and time and evidence must both be enough.
STEPS = (
    Step(mode="shadow", percent=100, hold_s=60),
    Step(percent=5, hold_s=60),
    Step(percent=50, hold_s=60),
)
GOOD_LIMIT_S = 3600
BAD_LIMIT_S = 1800
MAX_REQUESTS = 400
TARGET_REQUESTS = 100
TARGET_SHARE = 0.95
RATES = (0.05, 0.1, 0.2, 0.5, 1.0)
USUAL = (0.0, 0.001, 0.005, 0.01)


@dataclass(frozen=True)
class Way:
    """How requests reach a bad candidate; the rate of all requests gives it a few a second."""

    mode: Mode
    percent: float
    rate: float

    @property
    def name(self) -> str:
        """For tables, for example "canary 5 %"."""
        return f"{self.mode} {self.percent:g} %"


WAYS = (Way("shadow", 100, 4), Way("canary", 5, 80), Way("canary", 50, 8))


def good_traffic(seed: int) -> Traffic:
    """A load, a usual rate, and in half of all rollouts outages that both versions and the other organ share."""
    drawn = random.Random(seed)
    outages = []
    for _ in range(drawn.choice((0, 0, 1, 2))):
        start = drawn.uniform(0, 300)
        outages.append((start, start + drawn.uniform(5, 30), drawn.uniform(0.2, 1.0)))
    usual = USUAL[seed % len(USUAL)]
    return Traffic(drawn.choice((1.0, 5.0, 20.0)), usual, usual, tuple(outages), spread=drawn.uniform(0.2, 0.8))


def good(seed: int) -> Outcome:
    """One rollout of a candidate that is as good as the incumbent."""
    with simulation(good_traffic(seed), seed, SETTINGS) as simulated:
        return simulated.run(RolloutPlan(steps=STEPS, promote=True), GOOD_LIMIT_S)


def bad(rate: float, way: Way, seed: int) -> Outcome:
    """One rollout of a candidate that fails at a rate, in a step that lasts."""
    plan = RolloutPlan(steps=(Step(mode=way.mode, percent=way.percent, hold_s=BAD_LIMIT_S),), promote=True)
    traffic = Traffic(way.rate, USUAL[seed % 2], rate)
    with simulation(traffic, seed, SETTINGS) as simulated:
        return simulated.run(plan, BAD_LIMIT_S, MAX_REQUESTS)


def requests_until_back(outcomes: Sequence[Outcome]) -> list[float]:
    """The requests of each candidate until its rollback, in order; infinite if there was none."""
    return sorted(each.requests if each.state == State.ROLLED_BACK else float("inf") for each in outcomes)


def share_within(requests: Sequence[float], limit: float) -> float:
    """The share of rollouts that were rolled back within a number of requests."""
    return sum(each <= limit for each in requests) / len(requests)


def good_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """The table of good candidates, by the usual rate."""
    lines = table_head(
        "| usual rate of failures | rollouts | with shared outages | candidate's requests | promoted "
        "| taken back | target |"
    )
    for number, usual in enumerate(USUAL):
        seeds = range(number, len(outcomes), len(USUAL))
        own = [outcomes[seed] for seed in seeds]
        outages = sum(bool(good_traffic(seed).outages) for seed in seeds)
        back = sum(each.state != State.STABLE and bool(each.reason) for each in own)
        promoted = sum(each.was_stable for each in own)
        requests = sum(each.requests for each in own)
        lines.append(f"| {100 * usual:g} % | {len(own)} | {outages} | {requests} | {promoted} | {back} | 0 |")
    return lines


def bad_lines(found: dict[tuple[float, str], list[float]]) -> list[str]:
    """The table of bad candidates."""
    lines = table_head("| fails | reached by | median requests | 95th percentile | back within 100 | target |")
    for (rate, way), requests in found.items():
        median, late = requests[len(requests) // 2], requests[min(int(0.95 * len(requests)), len(requests) - 1)]
        share = share_within(requests, TARGET_REQUESTS)
        target = f"≥ {TARGET_SHARE:.0%}" if rate >= 0.1 else ""
        shown = [f"{each:g}" if each <= MAX_REQUESTS else f"> {MAX_REQUESTS}" for each in (median, late)]
        lines.append(f"| {rate:.0%} | {way} | {shown[0]} | {shown[1]} | {share:.1%} | {target} |")
    return lines


def draw(found: dict[tuple[float, str], list[float]], path: Path) -> None:
    """The part that was taken back against the candidate's requests, a curve for each rate of failures."""
    figure = new_figure(len(WAYS), sharey=True)
    for axis, way in zip(figure.axes, WAYS, strict=True):
        for rate in RATES:
            requests = found[rate, way.name]
            x = [1.0, *(each for each in requests if each <= MAX_REQUESTS), float(MAX_REQUESTS)]
            axis.step(x, [share_within(requests, each) for each in x], where="post", label=f"fails {rate:.0%}")
        axis.axvline(TARGET_REQUESTS, color="gray", linestyle=":")
        axis.axhline(TARGET_SHARE, color="gray", linestyle=":")
        axis.set_xscale("log")
        axis.set_xlabel("the candidate's requests")
        axis.set_title(way.name)
    figure.axes[0].set_ylabel("part taken back")
    figure.axes[0].legend(fontsize="small")
    save_figure(figure, path, "How soon a bad candidate is taken back")


def report(outcomes: Sequence[Outcome], found: dict[tuple[float, str], list[float]], each: int) -> str:
    """The page."""
    thresholds = SETTINGS.thresholds
    steps = ", ".join(f"{step.mode} {step.percent:g} % for {step.hold_s:g} s" for step in STEPS)
    back = [outcome for outcome in outcomes if outcome.state != State.STABLE]
    lines = [
        "# How candidates are judged",
        "",
        describe(),
        f"Simulated rollouts with the default thresholds (max_error_rate {thresholds.max_error_rate:.0%}, min_requests "
        f"{thresholds.min_requests}, min_successes {thresholds.min_successes}, max_latency_ratio "
        f"{thresholds.max_latency_ratio:g}), from `python -m benchmarks.judge`.",
        "",
        "## Good candidates",
        "",
        f"{len(outcomes)} rollouts of candidates that fail as often as the incumbent: {steps}, promotion, and "
        f"{SETTINGS.watch_after_promotion_s:g} s of watch. Each has 1, 5 or 20 requests a second; the logarithm of the "
        "time per token has a standard deviation of 0.2 to 0.8. In an outage of 5 to 30 s, 20 to 100 % of the requests "
        "fail: of both versions, and of another organ.",
        "",
        *good_lines(outcomes),
        "",
        *(f"- taken back or not done: {outcome.reason or outcome.state}" for outcome in back),
        "" if back else "None was taken back, before its promotion or after.",
        "",
        "## Bad candidates",
        "",
        f"{each} rollouts for each line; the incumbent fails in 0 or 0.1 % of its requests. "
        "Routers report once a second.",
        "",
        *bad_lines(found),
        "",
        "![The part taken back against requests](judge.png)",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulates, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--good", type=int, default=200, help="rollouts of good candidates (default: %(default)s)")
    parser.add_argument("--bad", type=int, default=200, help="rollouts of each bad candidate (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="simulate on so many cores (default: %(default)s)")
    options = parser.parse_args()
    check_drawing()
    console = Console()
    found: dict[tuple[float, str], list[float]] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        runs = track(pool.map(good, range(options.good)), "good", total=options.good, console=console)
        outcomes = list(runs)
        for rate in track(RATES, "bad", console=console):
            for way in WAYS:
                bad_runs = pool.map(partial(bad, rate, way), range(options.bad))
                found[rate, way.name] = requests_until_back(list(bad_runs))
    text = report(outcomes, found, options.bad)
    RESULT.write_text(text)
    RESULT.with_suffix(".json").write_text(json.dumps(_data(outcomes, found), indent=1) + "\n")
    draw(found, RESULT.with_suffix(".png"))
    console.print(text, markup=False)


def _data(outcomes: Sequence[Outcome], found: dict[tuple[float, str], list[float]]) -> dict[str, Any]:
    return {
        "good": [
            {"state": each.state, "requests": each.requests, "seconds": each.seconds, "was_stable": each.was_stable}
            for each in outcomes
        ],
        "bad": [
            {
                "rate": rate,
                "way": way,
                "requests": [each if each <= MAX_REQUESTS else None for each in requests],
            }
            for (rate, way), requests in found.items()
        ],
    }


if __name__ == "__main__":
    main()
