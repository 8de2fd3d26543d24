"""The demo model's accuracy on unseen phantoms: `python -m benchmarks.demo_quality --start CHECKPOINT`.

Draws phantoms of another seed than training's, as they are and as other machines would show them, and evaluates the
served system on reports about them in both languages, with the three baselines. Writes
`benchmarks/results/demo_quality.md` and `.json`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import describe
from benchmarks.measure_table import measure_table, table_head
from benchmarks.measured_gateway import add_gateway_options, gateway_of
from benchmarks.systems.protocol import SystemFailedError, exit_on_sigterm
from benchmarks.terminal import add_result_options, keep_result, progress_of_parts
from echovlm_ray.evaluation.baselines import VARIANTS
from echovlm_ray.evaluation.result import EvaluationResult, GroupScores
from echovlm_ray.tasks import LANGUAGES

ECHORAY = Path(sys.executable).with_name("echoray")
SEED = 90_001
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Condition:
    """How the phantoms of one evaluation are shown.

    Attributes:
        arguments: of `echoray data phantom`.
    """

    name: str
    arguments: tuple[str, ...] = ()


CONDITIONS = (
    Condition(PLAIN),
    Condition("12 % more gain", ("--settings", "gain=1.12")),
    Condition("blurred by 0.6 pixel", ("--settings", "blur=0.6")),
    Condition("JPEG of quality 80", ("--settings", "jpeg_quality=80")),
    Condition("DICOM", ("--format", "dicom")),
    Condition("DICOM cine loop", ("--format", "cine")),
)
# From how many on a value is good; what was measured under other conditions may be this much less.
ORGAN_GATE, DIAGNOSIS, WORST_CLASS, ABOVE_BLANK = 0.98, 0.92, 0.75, 0.5
ATTRIBUTE_F1, ALL_RIGHT, LOSS_ALLOWED = 0.90, 0.70, 0.03
BLEU, BLEU_ABOVE = 85.0, 15.0


def evaluate(condition: Condition, server: str, count: int, folder: Path) -> EvaluationResult:
    """Draws the phantoms of a condition and evaluates the system on them.

    Raises:
        SystemFailedError: a command failed.
    """
    # It needs what only evaluations install, and --help does not.
    from echovlm_ray.evaluation.run import RESULT_FILE

    corpus, output = folder / "corpus", folder / "results"
    drawn = ("--count", str(count), "--seed", str(SEED), "--task", "report", "--workers", "1", "--json")
    _run("data", "phantom", str(corpus), *drawn, *condition.arguments)
    _run("eval", "run", str(corpus / "records.json"), "--server", server, "--output", str(output), "--json")
    return EvaluationResult.model_validate_json((output / RESULT_FILE).read_bytes())


def _run(*arguments: str) -> None:
    done = subprocess.run([str(ECHORAY), *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemFailedError(f"echoray {' '.join(arguments[:2])}: {done.stderr.strip().splitlines()[-1]}")


def value(group: GroupScores | None, name: str) -> float | None:
    """A score of what was got right, if it could be computed."""
    score = None if group is None else group.substance.get(name)
    return None if score is None else score.value


def bleu(group: GroupScores | None) -> float | None:
    """BLEU-1 of a group, if it could be computed."""
    found = [] if group is None else [score.value for name, score in group.words.items() if name.startswith("BLEU-1")]
    return found[0] if found else None


def measures(found: dict[str, EvaluationResult]) -> list[tuple[str, str, str]]:
    """The rows of the table: measure, value, target."""
    plain = found[PLAIN]
    whole = plain.group("model")
    rows = [("organ gate without a hint", _text(value(whole, "organ gate")), f"≥ {ORGAN_GATE}")]
    for language in LANGUAGES:
        group, blank = plain.group("model", "language", language), plain.group("blank image", "language", language)
        diagnosis, without = value(group, "diagnosis accuracy"), value(blank, "diagnosis accuracy")
        rows += [
            (f"diagnosis accuracy, {language}", _text(diagnosis), f"≥ {DIAGNOSIS}"),
            (f"above the blank image, {language}", _difference(diagnosis, without), f"≥ {ABOVE_BLANK}"),
            (f"attribute F1, {language}", _text(value(group, "attribute F1")), f"≥ {ATTRIBUTE_F1}"),
            (f"all attributes right, {language}", _text(value(group, "all attributes right")), f"≥ {ALL_RIGHT}"),
            (f"BLEU-1, {language}", _text(bleu(group), 1), f"≥ {BLEU:.0f}"),
        ]
        rows += [
            (
                f"BLEU-1 above the baseline “{variant}”, {language}",
                _difference(bleu(group), bleu(plain.group(variant, "language", language)), 1),
                f"≥ {BLEU_ABOVE:.0f}",
            )
            for variant in VARIANTS[1:]
        ]
    worst = _worst_class(plain)
    rows.append((f"diagnosis accuracy of the worst class ({worst[0]})", _text(worst[1]), f"≥ {WORST_CLASS}"))
    for name in list(found)[1:]:
        other = found[name].group("model")
        rows += [
            (f"{name}: {measure}, less than plain", _difference(value(whole, measure), value(other, measure)), target)
            for measure, target in (
                ("diagnosis accuracy", f"≤ {LOSS_ALLOWED}"),
                ("attribute F1", f"≤ {LOSS_ALLOWED}"),
                ("all attributes right", f"≤ {LOSS_ALLOWED}"),
            )
        ]
    return rows


def _worst_class(result: EvaluationResult) -> tuple[str, float]:
    classes = [
        (group.name, accuracy)
        for group in result.groups
        if group.variant == "model" and group.by == "class"
        if (accuracy := value(group, "diagnosis accuracy")) is not None
    ]
    return min(classes, key=lambda pair: pair[1])


def _text(number: float | None, digits: int = 3) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def _difference(one: float | None, other: float | None, digits: int = 3) -> str:
    return "-" if one is None or other is None else f"{one - other:.{digits}f}"


def report(found: dict[str, EvaluationResult], count: int) -> tuple[str, dict[str, Any]]:
    """The result as Markdown and as values."""
    target = found[PLAIN].target
    versions = ", ".join(f"{organ} {version}" for organ, version in target.organs.items())
    classes = [
        (group.name, _text(value(group, "diagnosis accuracy")), _text(value(group, "all attributes right")))
        for group in found[PLAIN].groups
        if group.variant == "model" and group.by == "class"
    ]
    lines = [
        "# What the demo model gets right",
        "",
        describe(),
        "",
        f"{target.name} {target.version} ({versions}). Reports in both languages about {count} phantoms a condition, "
        f"of seed {SEED}, which training has not seen; all classes alike. Diagnosis is that of the report's "
        "impression, read by the phantoms' parser. Phantoms are synthetic: nothing here is about patients.",
        "",
        *measure_table(measures(found)),
        "",
        *table_head("| class | diagnosis accuracy | all attributes right |"),
        *(f"| {' | '.join(row)} |" for row in classes),
    ]
    values = {
        "machine": describe(),
        "seed": SEED,
        "count": count,
        "measures": measures(found),
        "groups": {
            name: [group.model_dump(mode="json") for group in result.groups if group.by in ("all", "language", "class")]
            for name, result in found.items()
        },
    }
    return "\n".join(lines) + "\n", values


def main() -> None:
    """Measures, prints and writes the result."""
    options = _options()
    exit_on_sigterm()
    console = Console(stderr=options.json)
    chosen: Sequence[Condition] = CONDITIONS[: options.conditions]
    found = {}
    try:
        with ExitStack() as stack:
            server = gateway_of(options, console, stack)
            bar = stack.enter_context(progress_of_parts(console))
            task = bar.add_task("evaluating", total=len(chosen))
            for condition in chosen:
                bar.update(task, description=condition.name)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                found[condition.name] = evaluate(condition, server, options.count, folder)
                bar.advance(task)
    except SystemFailedError as error:
        sys.exit(f"the system failed: {error}")
    text, values = report(found, options.count)
    keep_result("demo_quality", text, values, options, console)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_gateway_options(parser)
    parser.add_argument("--count", type=int, default=215, help="phantoms of each condition (default: %(default)s)")
    parser.add_argument(
        "--conditions", type=int, default=len(CONDITIONS), help="only the first so many (default: %(default)s)"
    )
    add_result_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
