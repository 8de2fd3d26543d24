"""What gates let through: `python -m benchmarks.gates`.

Evaluates candidates of the demo model against its stable versions, on phantoms of unseen seeds, as Control does it: the
questions go through the router's service, pinned to one version, and name no organ. Worse candidates are trained too
short from weights without knowledge, trained with shuffled labels, and another organ's experts under this organ's name.
The equal one has the same weights under a new version, and answers alike in every token. Versions that are as good and
answer differently are simulated. Writes `benchmarks/results/gates.md`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.gate_system import GateSystem, gate_system
from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from echovlm_ray.checkpoint.layout import registry_root
from echovlm_ray.evaluation.statistics import clusters_of, compare, f1_statistic
from experts.bundles.bundle import Bundle
from experts.bundles.manifest import BundleDescription
from experts.bundles.writer import write_bundle
from experts.registry.registry import Registry
from router.rollouts.gates import Gate, GateRun, Verdict, decide

RESULTS = Path(__file__).resolve().parent / "results" / "gates.md"
ECHORAY = Path(sys.executable).with_name("echoray")
ORGAN, OTHER = "liver", "kidney"
METRIC = "attribute_f1"
AT_LEAST, MARGIN = 0.8, 0.01
# None of them was trained on, and none is `benchmarks.demo_quality`'s.
FIRST_SEED = 91_001
SIMULATED_SEEDS = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """The results of all seeds' gates for one candidate.

    Attributes:
        refused: by the rule, how many of them.
    """

    name: str
    verdicts: tuple[Verdict, ...]
    refused: Mapping[str, int]
    seconds: float


def _describe(source: Bundle, organ: str, version: str) -> BundleDescription:
    content = source.manifest.model_dump(exclude={"format", "files", "probe"})
    return BundleDescription.model_validate({**content, "organ": organ, "version": version})


def _untrained(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Weights of the same size that know nothing, as a training begins with."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        return (drawn * tensor.float().std()).to(tensor.dtype)

    return draw


def _written(folder: Path, source: Bundle, version: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    def tensor(name: str) -> torch.Tensor:
        found = source.tensor(name)
        return change(found) if "experts" in name else found

    write_bundle(folder, _describe(source, ORGAN, version), tensor)
    return folder


def _phantoms(folder: Path, seed: int, count: int) -> Path:
    command = [ECHORAY, "data", "phantom", folder, "--organ", ORGAN, "--count", count, "--seed", seed]
    subprocess.run([*map(str, command), "--language", "en", "--task", "report"], check=True, capture_output=True)
    return folder / "records.json"


def _shuffled_labels(records: Path, target: Path) -> Path:
    """The same pictures with each other's reports and attributes."""
    content = json.loads(records.read_text())
    order = np.random.default_rng(0).permutation(len(content))
    shuffled = [
        {**record, "conversations": [record["conversations"][0], *content[other]["conversations"][1:]]}
        | {"attributes": content[other].get("attributes")}
        for record, other in zip(content, order, strict=True)
    ]
    path = target / "shuffled.json"
    path.write_text(json.dumps(shuffled))
    return path


def _trained(checkpoint: Path, folder: Path, base: str, version: str, data: Path, images: Path, steps: int) -> Path:
    command = [ECHORAY, "train", "expert", "--organ", ORGAN, "--checkpoint", checkpoint, "--base", base]
    command += ["--version", version, "--data", data, "--images", images, "--output", folder, "--threads", "1"]
    command += ["--set", f"stages.0.steps={steps}", "--device", "cpu", "--quiet"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"training failed: {done.stderr}")
    return folder / f"{ORGAN}-{version}"


def _candidates(checkpoint: Path, folder: Path, count: int, steps: int) -> dict[str, str]:
    """Name → digest of each candidate, all of them in the checkpoint's registry."""
    registry = Registry(registry_root(checkpoint))
    stable = registry.open(registry.find(ORGAN, "1.0.0").digest)
    other = registry.open(registry.find(OTHER, "1.0.0").digest)
    records = _phantoms(folder / "training", 5, count)
    blank = _written(folder / "blank", stable, "1.0.1", _untrained(0))
    registry.push(blank)
    made = {
        "equal: the same weights, a new version": _written(folder / "equal", stable, "1.0.2", lambda tensor: tensor),
        f"trained too short: {steps} steps from nothing": _trained(
            checkpoint, folder / "short", "1.0.1", "1.0.3", records, records.parent, steps
        ),
        f"labels shuffled: {10 * steps} steps": _trained(
            checkpoint,
            folder / "shuffled",
            "1.0.0",
            "1.0.4",
            _shuffled_labels(records, folder),
            records.parent,
            10 * steps,
        ),
    }
    # In the demo all organs have the same experts, and differ in the prototypes by which their pictures are known.
    relabelled = folder / "relabelled"
    write_bundle(relabelled, _describe(other, ORGAN, "1.0.5"), other.tensor)
    made[f"the experts of {OTHER}, relabelled"] = relabelled
    return {name: registry.push(bundle).digest for name, bundle in made.items()}


def _evaluated(system: GateSystem, gate: Gate, digest: str) -> tuple[Gate, GateRun, Verdict, Mapping[str, bool], float]:
    declared = system.evaluator.declare(gate)
    run = GateRun(declared, digest, system.stable[ORGAN], threading.Event(), lambda answered, questions: None)
    began = time.monotonic()
    evidence = system.evaluator.evaluate(run)
    seconds = time.monotonic() - began
    refused = {
        "at_least": not decide(declared.model_copy(update={"not_below_incumbent_by": None}), evidence).passed,
        "not_below_incumbent_by": not decide(declared.model_copy(update={"at_least": None}), evidence).passed,
    }
    return declared, run, decide(declared, evidence), refused, seconds


def _measured(system: GateSystem, name: str, digest: str, datasets: list[Path]) -> Row:
    system.offer(ORGAN, digest)
    verdicts, seconds = [], 0.0
    refused = {"at_least": 0, "not_below_incumbent_by": 0}
    for path in datasets:
        gate = Gate(dataset=str(path), metric=METRIC, organ=ORGAN, at_least=AT_LEAST, not_below_incumbent_by=MARGIN)
        _, _, verdict, found, took = _evaluated(system, gate, digest)
        verdicts.append(verdict)
        seconds += took
        for rule, value in found.items():
            refused[rule] += value
        print(f"{name}: {'passed' if verdict.passed else 'refused'}: {verdict.text}", flush=True)
    return Row(name, tuple(verdicts), refused, seconds)


def simulated(seeds: int, records: int, right: float, loss: float, margin: float) -> float:
    """The share of candidates that pass the comparison.

    Each record states five attributes, and each version states each of them rightly on its own: so the two differ as
    much as versions of the same quality can.

    Args:
        seeds: how often it is drawn.
        records: of the dataset.
        right: the incumbent's part of attributes that are right.
        loss: by how much the candidate's is smaller.
        margin: of the gate.
    """
    passed = 0
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        scores = []
        for rate in (right, right - loss):
            hits = generator.binomial(5, rate, size=records)
            scores.append(f1_statistic([(int(hit), 5 - int(hit), 5 - int(hit)) for hit in hits], "none"))
        clusters = clusters_of([str(index) for index in range(records)])
        found = compare(scores[0], scores[1], clusters, draws=1000, seed=0)
        assert found.high is not None
        passed += found.high >= -margin
    return passed / seeds


def _page(rows: list[Row], records: int, simulations: Mapping[tuple[int, float], float], seeds: int) -> str:
    lines = [
        "# What gates let through",
        "",
        describe(),
        "",
        f"Gate: `{METRIC}` of {ORGAN}, `at_least: {AT_LEAST:g}`, `not_below_incumbent_by: {MARGIN:g}`; {records} "
        "phantoms of an unseen seed each time. Made by `python -m benchmarks.gates`.",
        "",
        *table_head(
            "| candidate | seeds | let through | refused by `at_least` | refused by the comparison "
            "| lowest and highest figures | s a gate |"
        ),
    ]
    for row in rows:
        texts = sorted(verdict.text.split(" is ")[1][:5] for verdict in row.verdicts)
        through = sum(verdict.passed for verdict in row.verdicts)
        lines.append(
            f"| {row.name} | {len(row.verdicts)} | {through} | {row.refused['at_least']} | "
            f"{row.refused['not_below_incumbent_by']} | {texts[0]} to {texts[-1]} | "
            f"{row.seconds / len(row.verdicts):.0f} |"
        )
    lines += [
        "",
        "The same weights answer with the same tokens, so that the difference is 0 in every seed. Versions that are as "
        "good, or worse, and differ in their errors as much as they can were simulated: each states each of five "
        f"attributes of a record rightly with a probability of 0.9 (the candidate: less the loss), {seeds} seeds.",
        "",
        *table_head("| records | loss of the candidate | let through by the comparison |"),
    ]
    lines += [f"| {count} | {loss:g} | {part:.1%} |" for (count, loss), part in simulations.items()]
    lines += ["", "What evaluations cost those who ask meanwhile: [gate_cost.md](gate_cost.md)."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--training-records", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--simulated-seeds", type=int, default=SIMULATED_SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="echovlm-gates-") as name:
        folder = Path(name)
        checkpoint = folder / "demo"
        subprocess.run([str(ECHORAY), "checkpoint", "demo", str(checkpoint)], check=True, capture_output=True)
        candidates = _candidates(checkpoint, folder, options.training_records, options.steps)
        datasets = [
            _phantoms(folder / f"held-{seed}", FIRST_SEED + seed, options.records) for seed in range(options.seeds)
        ]
        with gate_system(checkpoint, questions_per_s=1000.0) as system:
            rows = [_measured(system, name, digest, datasets) for name, digest in candidates.items()]
    simulations = {
        (records, loss): simulated(options.simulated_seeds, records, 0.9, loss, MARGIN)
        for records in (40, 200)
        for loss in (0.0, 0.01, 0.02, 0.05, 0.1)
    }
    RESULTS.write_text(_page(rows, options.records, simulations, options.simulated_seeds))


if __name__ == "__main__":
    main()
