"""What one caller's flood costs another: `python -m benchmarks.fairness`.

Starts a system on a copy of the demo checkpoint with two tokens. One caller keeps many long prompts running; the
other asks short questions one after the other, with a picture and without. The time to the first piece of its answers
is measured in turns without the flood, beside the flood of the other caller, and, for comparison, beside a flood of its
own token, which shares its place. Writes `benchmarks/results/fairness.md`.
"""

import argparse
import secrets
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from benchmarks.flood import Counts, Flood, flooded
from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from benchmarks.swaps import copied
from benchmarks.systems.protocol import MeasuredSystem, SystemFailedError, exit_on_sigterm
from benchmarks.terminal import progress_of_parts, show_result
from echovlm_ray.client import EchoVLMClient, EchoVLMError, Text
from echovlm_ray.data.phantom.corpus import png_bytes
from echovlm_ray.data.phantom.phantom import phantoms

RESULT = Path(__file__).resolve().parent / "results" / "fairness.md"
TIMEOUT_S = 300.0
TARGET = 2.0
SITUATIONS = ("alone", "other caller's flood", "own flood")


@dataclass
class Measured:
    """Seconds to the first piece of each answer, by situation and kind of question; and what the floods came to."""

    floods: Counts = field(default_factory=Counts)
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def median(self, situation: str, kind: str) -> float:
        """The median of one situation."""
        return statistics.median(self.seconds[situation, kind])

    def ratio(self, situation: str, kind: str) -> float:
        """The ratio to the time without a flood, by the medians."""
        return self.median(situation, kind) / self.median("alone", kind)


def first_piece_s(client: EchoVLMClient, picture: bytes | None) -> float:
    """Asks one short question; seconds to the first piece of the answer."""
    images = [] if picture is None else [picture]
    began = time.monotonic()
    first = 0.0
    with client.stream(
        images, prompt=f"What is shown {secrets.token_hex(2)}?", task="free", max_new_tokens=8, timeout_s=TIMEOUT_S
    ) as stream:
        for event in stream:
            if isinstance(event, Text) and not first:
                first = time.monotonic() - began
    return first


def measure(
    address: str, tokens: Sequence[str], flood: Flood, *, rounds: int, questions: int, console: Console
) -> Measured:
    """All situations in turn, several times.

    Raises:
        EchoVLMError: a short question failed.
    """
    measured = Measured()
    count = rounds * questions * len(SITUATIONS) + 1
    pictures = [png_bytes(phantom.image) for phantom in phantoms(20, range(count))]
    own, other = tokens
    # Of one caller's places, the question needs one.
    own_flood = replace(flood, at_once=flood.at_once - 1)
    with ExitStack() as stack:
        client = stack.enter_context(EchoVLMClient(address, token=own))
        progress = stack.enter_context(progress_of_parts(console))
        task = progress.add_task("asking", total=rounds * len(SITUATIONS))
        first_piece_s(client, pictures.pop())
        for _ in range(rounds):
            for situation in SITUATIONS:
                progress.update(task, description=situation)
                with ExitStack() as turn:
                    if situation != "alone":
                        token, offered = (own, own_flood) if situation == "own flood" else (other, flood)
                        turn.enter_context(flooded(address, token, offered, measured.floods))
                    for _ in range(questions):
                        for kind, picture in (("text", None), ("picture", pictures.pop())):
                            seconds = first_piece_s(client, picture)
                            measured.seconds.setdefault((situation, kind), []).append(seconds)
                progress.advance(task)
    return measured


def report(measured: Measured, flood: Flood) -> str:
    """The page."""
    lines = [
        "# What one caller's flood costs another",
        "",
        f"`python -m benchmarks.fairness`: {describe()}",
        "",
        f"The flood: {flood.at_once} requests of one caller always under way, each of {flood.words} words and "
        f"{flood.new_tokens} new tokens, from a process of its own on the same machine. Another caller asks short "
        "questions one after the other; the time to the first piece of each answer, in milliseconds. "
        f"{measured.floods.answered} requests of the floods were answered, {measured.floods.failed} failed or were "
        "refused.",
        "",
        *table_head("| question | situation | asked | median | p90 | ÷ alone |"),
    ]
    for kind in ("text", "picture"):
        for situation in SITUATIONS:
            seconds = sorted(measured.seconds[situation, kind])
            p90 = seconds[min(len(seconds) - 1, int(0.9 * len(seconds)))]
            lines.append(
                f"| {kind} | {situation} | {len(seconds)} | {1e3 * measured.median(situation, kind):.0f} "
                f"| {1e3 * p90:.0f} | {measured.ratio(situation, kind):.2f} |"
            )
    worst = max(measured.ratio("other caller's flood", kind) for kind in ("text", "picture"))
    lines += ["", f"Target: at most {TARGET} times as long as alone; {worst:.2f}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=60, help="requests of the flood (default: %(default)s)")
    parser.add_argument("--words", type=int, default=600, help="of each prompt of the flood (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the flood's answers (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all situations (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=10, help="of each kind in a turn (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the measured times as JSON")
    options = parser.parse_args()
    exit_on_sigterm()
    console = Console(stderr=True)
    flood = Flood(options.at_once, options.words, options.new_tokens)
    tokens = [secrets.token_urlsafe(16) for _ in range(2)]
    try:
        with ExitStack() as stack:
            checkpoint, folder = stack.enter_context(copied(None))
            token_file = folder / "tokens"
            token_file.touch(mode=0o600)
            token_file.write_text("\n".join(tokens) + "\n")
            arguments = ["-m", "benchmarks.systems.gateway", "--checkpoint", str(checkpoint)]
            with console.status("starting the system"):
                system = stack.enter_context(MeasuredSystem([*arguments, "--token-file", str(token_file)], {}))
                address = str(system.wait_until_ready()["address"])
            measured = measure(
                address, tokens, flood, rounds=options.rounds, questions=options.questions, console=console
            )
    except (SystemFailedError, EchoVLMError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    text = report(measured, flood)
    RESULT.write_text(text)
    values = {f"{situation}, {kind}": times for (situation, kind), times in measured.seconds.items()}
    show_result(text, values, console, as_json=options.json)


if __name__ == "__main__":
    main()
