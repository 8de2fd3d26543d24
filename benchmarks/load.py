"""Goodput under open-loop load: `python -m benchmarks.load --server 127.0.0.1:50051 --rate 1,2,4`.

Requests arrive as a Poisson process, whatever became of the earlier ones, at one rate after the other. A request is
good when it is answered within both latency targets. Ctrl-C ends the measurement, and reports what there is so far.
With `--start CHECKPOINT` the system is started, and ended afterwards. Writes `benchmarks/results/load.md`, `.json` and
`.png`, unless it was cut short.
"""

import argparse
import asyncio
import random
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.drawing import check_drawing
from benchmarks.goodput import RateResult, Targets, rate_table, result_of
from benchmarks.machine import describe
from benchmarks.measured_gateway import add_gateway_options, gateway_of
from benchmarks.open_loop import Question, Trial, offer, poisson_arrivals
from benchmarks.plots import plot_goodput
from benchmarks.systems.protocol import SystemFailedError, exit_on_sigterm
from benchmarks.terminal import add_result_options, keep_result, show_result
from echovlm_ray.checkpoint.demo_text import ENGLISH
from echovlm_ray.client import AsyncEchoVLMClient, EchoVLMError, GenerateOptions, ModelInfo

REFRESH_S = 0.25


@dataclass(frozen=True, slots=True)
class Plan:
    """What is offered.

    Attributes:
        rates: requests a second, one after the other.
        seconds: for how long each.
        timeout_s: each request's deadline.
        images: files that every request carries.
        seed: of arrivals and prompts.
    """

    rates: tuple[float, ...]
    seconds: float
    targets: Targets
    timeout_s: float
    prompt_words: int
    new_tokens: int
    images: tuple[Path, ...]
    seed: int

    def questions(self, rate_index: int, organs: Sequence[str]) -> "Questions":
        """The requests of one rate."""
        images = tuple(path.read_bytes() for path in self.images)
        return Questions(f"{self.seed}, {rate_index}", self.prompt_words, self.new_tokens, tuple(organs), images)


@dataclass(frozen=True, slots=True)
class Questions:
    """Requests of random words, no two alike, each about one of the organs."""

    seed: str
    words: int
    new_tokens: int
    organs: tuple[str, ...]
    images: tuple[bytes, ...]

    def __call__(self, index: int) -> Question:
        """The request of that number; the same number gives the same request."""
        numbers = random.Random(f"{self.seed}, {index}")
        organs = [numbers.choice(self.organs)] if self.organs else []
        prompt = " ".join(numbers.choices(ENGLISH.split(), k=self.words))
        options = GenerateOptions(task="free", prompt=prompt, organs=organs, max_new_tokens=self.new_tokens)
        return Question(options, self.images)


async def measure(server: str, plan: Plan, console: Console, results: list[RateResult]) -> ModelInfo:
    """Offers all rates, and appends a result for each; Ctrl-C ends it early."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # What is lost is counted, not sent again unnoticed.
    async with AsyncEchoVLMClient(server, retry=False) as client:
        info = await client.model_info()
        # A flat set takes no organ from the caller, but is not hurt by one.
        organs = [organ.organ for organ in info.organs]
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=plan.seconds * len(plan.rates))
            await _warm_up(client, plan, organs)
            for index, rate in enumerate(plan.rates):
                trial = Trial(rate)
                progress.console.print(f"{rate:g} requests/s for {plan.seconds:g} s", highlight=False)
                show = asyncio.create_task(_show(progress, task, trial, index, plan))
                await offer(
                    client,
                    trial,
                    poisson_arrivals(rate, plan.seconds, plan.seed + index),
                    plan.questions(index, organs),
                    seconds=plan.seconds,
                    timeout_s=plan.timeout_s,
                    stopping=stopping,
                )
                show.cancel()
                results.append(result_of(trial, plan.targets))
                if stopping.is_set():
                    break
    return info


async def _warm_up(client: AsyncEchoVLMClient, plan: Plan, organs: Sequence[str]) -> None:
    """One answer of every organ."""
    question = plan.questions(-1, ())
    for index, organ in enumerate(organs):
        asked = question(index)
        asked.options["organs"] = [organ]
        await client.generate(asked.images, timeout_s=plan.timeout_s, **asked.options)


async def _show(progress: Progress, task: TaskID, trial: Trial, index: int, plan: Plan) -> None:
    began = asyncio.get_running_loop().time()
    while True:
        passed = min(plan.seconds, asyncio.get_running_loop().time() - began)
        ended = len(trial.outcomes)
        description = f"{trial.rate:g} requests/s: {trial.arrived} sent, {trial.arrived - ended} under way"
        progress.update(task, description=description, completed=index * plan.seconds + passed)
        await asyncio.sleep(REFRESH_S)


def report(plan: Plan, info: ModelInfo, results: Sequence[RateResult]) -> str:
    """The result as Markdown."""
    best = max(results, key=lambda result: result.goodput)
    images = f", {len(plan.images)} image file(s)" if plan.images else ""
    lines = [
        "# Goodput under open-loop load",
        "",
        describe(),
        f"Checkpoint {info.name}; load generator on the same machine. Prompts of {plan.prompt_words} random words"
        f"{images}, at most {plan.new_tokens} new tokens, greedy, organs at random. Poisson arrivals for "
        f"{plan.seconds:g} s at each rate, which never wait for answers.",
        "",
        f"A request is good when it has its {plan.targets}. Best: **{best.goodput:.2f} good requests a second**, "
        f"offered {best.offered:g}.",
        "",
        *rate_table(results),
        "",
        "Arrived and goodput count for each second in which requests arrived; answered for each second until the last "
        "answer. Percentiles are those of answered requests. "
        f"Requests were sent at most {max(result.lag_ms for result in results):.1f} ms late (p99 of the worst rate).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints and writes the result."""
    options = _options()
    check_drawing()
    exit_on_sigterm()
    console = Console(stderr=options.json)
    plan = Plan(
        rates=tuple(float(text) for text in options.rate.split(",")),
        seconds=options.seconds,
        targets=Targets(options.target_ttft_ms / 1e3, options.target_itl_ms / 1e3),
        timeout_s=options.timeout,
        prompt_words=options.prompt_words,
        new_tokens=options.new_tokens,
        images=tuple(options.image),
        seed=options.seed,
    )
    results: list[RateResult] = []
    try:
        with ExitStack() as stack:
            server = gateway_of(options, console, stack)
            info = asyncio.run(measure(server, plan, console, results))
    except (EchoVLMError, SystemFailedError) as error:
        sys.exit(f"the system failed: {error}")
    except KeyboardInterrupt:
        # Before the first request; afterwards it only sets an event.
        sys.exit("stopped before a request was sent")
    if not any(result.requests for result in results):
        sys.exit("stopped before a request was sent")
    text = report(plan, info, results)
    values = {
        "machine": describe(),
        "checkpoint": info.name,
        "target_first_text_ms": options.target_ttft_ms,
        "target_per_token_ms": options.target_itl_ms,
        "rates": [result.to_json() for result in results],
    }
    if any(result.cut_short for result in results):
        show_result(text, values, console, as_json=options.json)
        console.print("Cut short: nothing was written.")
        return
    picture = keep_result("load", text, values, options, console, "goodput and latency")
    plot_goodput(results, f"{info.name}: {plan.targets}", picture)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_gateway_options(parser)
    parser.add_argument("--rate", default="0.5,1,2,4,8", help="requests a second, a sweep (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each rate (default: %(default)s)")
    parser.add_argument(
        "--target-ttft-ms", type=float, default=1000.0, help="time to the first token (default: %(default)s)"
    )
    parser.add_argument(
        "--target-itl-ms", type=float, default=150.0, help="mean time for each further token (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="deadline of a request, s (default: %(default)s)")
    parser.add_argument("--prompt-words", type=int, default=40, help="of each request (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="at most, of each request (default: %(default)s)")
    parser.add_argument("--image", type=Path, action="append", default=[], help="send this file too; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and prompts (default: %(default)s)")
    add_result_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
