"""Writes docs/structures.md from the modules' docstrings: `make structures`."""

import argparse
import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structures.md"
TITLES = {
    "protos": "protos: the contracts",
    "experts": "experts: one organ's expert group",
    "router": "router: where requests and tokens go",
    "echovlm_ray": "echovlm_ray",
    "requirements": "requirements: what is installed, with hashes",
    "cluster": "cluster: configuration files",
}
INTRODUCTION = """\
# Structures

This page answers two questions: where to change something, and what each module is for.

- Imports run one way: `protos ← experts ← router ← echovlm_ray`, and within `echovlm_ray` from the command line down to
  the model. `tests/test_architecture.py` checks it.
- A request runs image → gateway → router (→ vision encoder) → engine → per layer the token gate → dispatch → an expert
  replica → its kernel, and back → sampler → gateway.
- [One request](request.md) and [one swap](swap.md) show the objects. [Names](names.md) has the vocabulary and the
  dimension suffixes.

## Where to change what

| to change or add | start in | at | then |
| --- | --- | --- | --- |
{rows}

Tests mirror the packages: `tests/experts/kernels` tests `experts/kernels`.
"""


class Place(NamedTuple):
    """Where to make one kind of change.

    Attributes:
        change: what to change or add.
        path: the file to start in.
        name: what to look for in that file; "" for the file as a whole.
        then: what else belongs to the change.
    """

    change: str
    path: str
    name: str
    then: str


PLACES = (
    Place(
        "an expert kernel",
        "experts/kernels/base.py",
        "ExpertKernel",
        "a module in `experts/kernels/`, and its name in `experts/kernels/registry.py`; [kernels](kernels.md)",
    ),
    Place("a task", "echovlm_ray/tasks.py", "TASKS", "its value in `protos/echovlm.proto`"),
    Place(
        "the gate that chooses experts for a token",
        "router/gating/token_gate.py",
        "choose_experts",
        "its load-balancing loss is in `echovlm_ray/model/load_balancing.py`",
    ),
    Place("the gate that chooses organs for a request", "router/gating/organ_gate.py", "OrganGate", ""),
    Place(
        "which requests are in the next batch",
        "echovlm_ray/engine/scheduler.py",
        "schedule",
        "the order among callers is in `echovlm_ray/engine/fairness.py`",
    ),
    Place("the tensors of a batch", "echovlm_ray/engine/step_batch.py", "StepBatch", ""),
    Place("how a token is sampled", "echovlm_ray/engine/sampler.py", "", ""),
    Place(
        "a threshold of rollouts",
        "router/rollouts/settings.py",
        "Thresholds",
        "`router/rollouts/judge.py` compares; the section `rollouts` of `cluster/local.yaml` repeats the field",
    ),
    Place(
        "a state or an operation of rollouts",
        "router/rollouts/states.py",
        "Action",
        "`router/rollouts/operations.py`, then `protos/control.proto`",
    ),
    Place(
        "a table or column of the rollouts' database",
        "router/rollouts/schema.py",
        "",
        "a module in `router/rollouts/migrations/versions`",
    ),
    Place(
        "an evaluation that a candidate must pass",
        "router/rollouts/gates.py",
        "Gate",
        "`echovlm_ray/serving/gates/` computes its figures",
    ),
    Place(
        "a Prometheus metric",
        "echovlm_ray/serving/cluster/metrics.py",
        "RouterMetrics",
        "the list in [rollouts](rollouts.md)",
    ),
    Place(
        "a gRPC method",
        "protos/echovlm.proto",
        "service EchoVLM",
        "`make protos`, then `echovlm_ray/serving/grpc/gateway.py`; [protocol](protocol.md)",
    ),
    Place(
        "an HTTP route, or another transport",
        "echovlm_ray/serving/core/session.py",
        "GenerateSession",
        "there is no HTTP server yet: add a package beside `echovlm_ray/serving/grpc/` that calls this class, as "
        "`echovlm_ray/serving/grpc/gateway.py` does; errors come from `echovlm_ray/serving/core/failures.py`",
    ),
    Place("an error that callers get", "echovlm_ray/serving/core/failures.py", "", "[protocol](protocol.md)"),
    Place(
        "how a replica finds another",
        "echovlm_ray/serving/cluster/endpoints.py",
        "Endpoints",
        "`echovlm_ray/serving/grpc/replica_pool.py` keeps the channels",
    ),
    Place(
        "what runs as a Ray Serve application",
        "echovlm_ray/serving/deploy/applications.py",
        "",
        "its class in `echovlm_ray/serving/deploy/`",
    ),
    Place(
        "a field of the configuration",
        "echovlm_ray/config.py",
        "Config",
        "the same field and comment in `cluster/local.yaml`",
    ),
    Place("a command", "echovlm_ray/cli/main.py", "", "a module in `echovlm_ray/cli/`"),
    Place(
        "an image or video format",
        "echovlm_ray/vision/kinds.py",
        "file_kind",
        "`echovlm_ray/vision/images.py`; [images](images.md)",
    ),
    Place(
        "a training recipe",
        "echovlm_ray/training/recipes/scratch.yaml",
        "",
        "another file in that folder; the fields are in `echovlm_ray/training/recipe.py`",
    ),
    Place("a loss", "echovlm_ray/training/objective.py", "", "its coefficient in `echovlm_ray/training/recipe.py`"),
    Place(
        "an evaluation metric",
        "echovlm_ray/evaluation/scoring.py",
        "metrics_of",
        "`echovlm_ray/evaluation/judging.py` compares one answer with the truth",
    ),
    Place("a field of a bundle's manifest", "experts/bundles/manifest.py", "", "[bundles](bundles.md)"),
)


def modules() -> list[Path]:
    """All files with a line of their own, relative to the repository: sources, contracts and configuration files."""
    return [
        path.relative_to(ROOT)
        for package in TITLES
        for path in sorted((ROOT / package).rglob("*"))
        if path.suffix in (".py", ".proto", ".yaml", ".c", ".h")
        and not re.search(r"_pb2(_grpc)?\.py$", path.name)
        and (path.name != "__init__.py" or path.read_text().strip())
    ]


def page() -> str:
    """The whole page."""
    folders: dict[str, list[str]] = {}
    for path in modules():
        folders.setdefault(str(path.parent), []).append(f"| `{path}` | {_first_sentence(ROOT / path)} |")
    rows = [
        f"| {place.change} | `{place.path}` | {f'`{place.name}`' if place.name else ''} | {place.then} |"
        for place in PLACES
    ]
    parts = [INTRODUCTION.format(rows="\n".join(rows))]
    for folder, rows in folders.items():
        parts.append("\n".join([f"## {TITLES.get(folder, folder)}", "", "| module | |", "| --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _first_sentence(path: Path) -> str:
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
    elif path.suffix in (".c", ".h"):
        comment = re.match(r"/\*(.*?)\*/", path.read_text(), re.DOTALL)
        text = re.sub(r"^ \* ?", "", comment.group(1), flags=re.MULTILINE) if comment else ""
    else:
        comment = re.match(r"(?:(?://|#).*\n)+", path.read_text())
        text = re.sub(r"^(?://|#) ?", "", comment.group(0), flags=re.MULTILINE) if comment else ""
    paragraph = text.strip().split("\n\n")[0].replace("\n", " ")
    sentence = re.match(r"(.*?[.!?])(?:\s[A-Z`]|$)", paragraph)
    return sentence.group(1) if sentence else paragraph


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page())
