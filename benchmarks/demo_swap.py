"""The flagship demonstration: `make demo-swap`, or `python -m benchmarks.demo_swap`.

Serves the demo with `breast 1.0.0`, whose experts have never seen a simple cyst in a breast, and asks for reports about
phantoms of a seed that training did not use. Then, while callers go on asking without pause, a rollout file takes
`breast 1.1.0` through its gates and a canary to all of the traffic. Afterwards the same questions are asked again:
the reports about cysts should be right now, and those about other organs the same to the letter.

Writes `demo_swap.md`, `.json`, two pictures and the history into a folder, and ends with status 1 if anything is not as
promised.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.demo_swap_callers import LEFT_OUT, ORGAN, Question, ask_all, callers, draw_questions
from benchmarks.demo_swap_report import Findings, example, plot_recall, plot_swap, table
from benchmarks.drawing import check_drawing
from benchmarks.machine import describe
from benchmarks.swap_operations import ControlWatch, SwapFailedError
from benchmarks.systems.protocol import MeasuredSystem, SystemFailedError, exit_on_sigterm
from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.layout import OrganEntry, registry_root, write_index
from echovlm_ray.client import EchoVLMError
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.data.phantom.catalogue import all_classes
from echovlm_ray.data.phantom.corpus import Corpus, write_corpus
from echovlm_ray.yaml_document import write_yaml
from experts.registry.registry import Registry

BEFORE, AFTER = "1.0.0", "1.1.0"
ECHORAY = Path(sys.executable).with_name("echoray")
# States of a rollout that the picture shows.
SHOWN = ("canary", "stable")
AT_ONCE = 8
# The callers go on for so long before and after the rollout.
MARGIN_S = 2.0
# No corpus that training, its validation or other benchmarks use.
SEED = 160_001


def serve_before(checkpoint: Path) -> None:
    """Makes the demo checkpoint, with the version before as the one that is served."""
    index, _ = make_demo(checkpoint)
    manifest = Registry(registry_root(checkpoint)).find(ORGAN, BEFORE)
    entry = OrganEntry(organ=ORGAN, version=BEFORE, bundle_digest=manifest.digest)
    organs = tuple(entry if found.organ == ORGAN else found for found in index.organs)
    write_index(checkpoint, index.model_copy(update={"organs": organs}))


def write_rollout(path: Path, dataset: Path) -> None:
    """Writes the rollout file: what the candidate must know, then a canary, then all of the traffic."""
    content = {
        "organ": ORGAN,
        "version": AFTER,
        "reason": "has learnt the simple cyst",
        "gates": [
            {
                "dataset": str(dataset),
                "metric": "attribute_f1",
                "organ": ORGAN,
                "at_least": 0.8,
                "not_below_incumbent_by": 0.01,
            }
        ],
        "steps": [{"percent": 50, "hold_s": 3, "min_successes": 10}],
        "promote": True,
    }
    write_yaml(path, content)


def run(options: argparse.Namespace, work: Path, console: Console) -> Findings:
    """Serves, sends the questions, swaps under load, and sends the questions again."""
    started = time.monotonic()
    checkpoint, dataset, rollout = work / "checkpoint", work / "gate", work / "rollout.yaml"
    console.rule("Serving the demo with breast 1.0.0", style="dim")
    serve_before(checkpoint)
    with MeasuredSystem(["-m", "benchmarks.systems.gateway", "--checkpoint", str(checkpoint)], {}) as system:
        # The phantoms are drawn while the system starts.
        questions = draw_questions(options.seed, options.cysts, options.breasts, options.others)
        draw_gate(dataset, options.seed + 3, options.gate)
        write_rollout(rollout, dataset / "records.json")
        ready = system.wait_until_ready()
        with ExpertControlClient(ready["control"]) as control, ControlWatch(control, ORGAN) as watch:
            control_option = ("--control", str(ready["control"]))
            console.print(f"Reports about {len(questions)} unseen phantoms, by {ORGAN} {BEFORE} …")
            before = ask_all(ready["address"], questions, AT_ONCE)
            console.rule(f"{ORGAN} {AFTER}, while {options.callers} callers ask without pause", style="dim")
            console.print(rollout.read_text(encoding="utf-8"), markup=False, highlight=False)
            with callers(ready["address"], mixed(questions), options.callers) as heard:
                time.sleep(MARGIN_S)
                show(console, "experts", "apply", str(rollout), "--wait", *control_option)
                returned = time.monotonic()
                time.sleep(MARGIN_S)
            newest = watch.rollout
            assert newest is not None
            console.rule(f"The same phantoms, by {ORGAN} {AFTER}", style="dim")
            after = ask_all(ready["address"], questions, AT_ONCE)
            show(console, "experts", "history", ORGAN, *control_option)
            history = json.loads(command("experts", "history", ORGAN, "--json", *control_option))
            seen = {state: watch.since(newest.id, state) for state in SHOWN}
    return Findings(
        versions=(BEFORE, AFTER),
        before=before,
        after=after,
        heard=heard,
        moments={state: moment for state, moment in seen.items() if moment is not None},
        returned=returned,
        history=history,
        seconds=time.monotonic() - started,
    )


def command(*arguments: str) -> str:
    """What `echoray` prints.

    Raises:
        SystemFailedError: it ended with another status than 0.
    """
    done = subprocess.run([str(ECHORAY), *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemFailedError(f"echoray {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def show(console: Console, *arguments: str) -> None:
    """Runs an `echoray` command line and shows its output.

    Raises:
        SystemFailedError: it ended with another status than 0.
    """
    console.print(f"$ echoray {' '.join(arguments)}", style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(command(*arguments), markup=False, highlight=False, soft_wrap=True)


def mixed(questions: Sequence[Question]) -> list[Question]:
    """The questions with those about one class spread among the others, the same way each time."""
    return random.Random(0).sample(questions, len(questions))


def draw_gate(directory: Path, seed: int, pictures: int) -> None:
    """Writes the dataset of the gate: the breast's classes in turn, with the one that was left out."""
    classes = tuple(pair for pair in all_classes() if pair[0] == ORGAN)
    write_corpus(directory, Corpus(seed, range(pictures), classes, languages=("en",)))


def write_results(found: Findings, folder: Path) -> str:
    """Writes all there is to see; the table."""
    lines = [f"# {ORGAN} {found.versions[0]} replaced by {found.versions[1]} under load", "", *table(found), ""]
    if shown := example(found):
        picture, texts = shown
        (folder / "cyst.png").write_bytes(picture)
        lines += ["![A computed ultrasound picture of a breast with a black oval](cyst.png)", "", *texts, ""]
    lines += [
        "![Recall by class, and changed answers by organ](recall.png)",
        "",
        "![Requests and pauses](swap.png)",
        "",
    ]
    text = "\n".join([*lines, describe()])
    (folder / "demo_swap.md").write_text(text + "\n", encoding="utf-8")
    content = json.dumps(found.to_json(), indent=2, ensure_ascii=False)
    (folder / "demo_swap.json").write_text(content + "\n", encoding="utf-8")
    plot_recall(found, folder / "recall.png")
    plot_swap(found, folder / "swap.png")
    return text


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo-swap"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the phantoms (default: %(default)s)")
    parser.add_argument("--cysts", type=int, default=24, help=f"pictures of {ORGAN}/{LEFT_OUT} (default: %(default)s)")
    parser.add_argument(
        "--breasts", type=int, default=24, help=f"pictures of {ORGAN}'s other classes (default: %(default)s)"
    )
    parser.add_argument("--others", type=int, default=72, help="pictures of the other organs (default: %(default)s)")
    parser.add_argument("--gate", type=int, default=16, help="pictures of the gate's dataset (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=4, help="that ask without pause (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("cysts", "breasts", "others", "gate", "callers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: at least 1")
    if options.seed < 0:
        parser.error("--seed: at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demonstration."""
    options = parsed(arguments)
    check_drawing()
    exit_on_sigterm()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as work:
            found = run(options, Path(work), console)
    except KeyboardInterrupt:
        sys.exit("interrupted; the system has ended, and nothing was written")
    except (SystemFailedError, SwapFailedError, EchoVLMError, OSError) as error:
        sys.exit(f"error: {error}")
    console.rule(style="dim")
    console.print(write_results(found, options.out), markup=False, soft_wrap=True)
    console.print(f"\nTable, pictures and history: {options.out}/", markup=False, soft_wrap=True)
    if not found.is_as_promised:
        sys.exit("not everything is as promised: see the table")


if __name__ == "__main__":
    main()
