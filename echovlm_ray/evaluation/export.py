"""Predictions and references in the format of U2-BENCH's evaluation kit.

The kit (github.com/dolphin-sound/u2-bench-evalkit, commit 4ab2465, `vlmeval/eval_func/report_eval.py` and
`cla_eval.py`) looks for `<task>/<dataset>/<model>/multimodal_test_results*.jsonl` with `id`, `response` and `model` a
line, and for a TSV whose rows are the same records in the same order: reports in its column `caption`, classes in its
column `classes`. Its classification reads a TSV that has a column `id` wrongly, so there is none.
"""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from echovlm_ray.checkpoint.atomic import naming_file, new_folder
from echovlm_ray.data.phantom.catalogue import find_class
from echovlm_ray.data.record import InvalidDataError
from echovlm_ray.evaluation.items import Item
from echovlm_ray.evaluation.judging import judge

PREDICTIONS_FILE = "multimodal_test_results_echovlm.jsonl"
# The kit's marker of an answer that matches no class.
UNKNOWN_CLASS = "unknown"
# pandas reads these as a missing value, and the kit would compare with "nan".
_MISSING = frozenset(("", "na", "n/a", "nan", "null", "none", "<na>", "#n/a", "-nan"))


@dataclass(frozen=True, slots=True)
class Exported:
    """The written files: the kit's task, and the number of records."""

    task: str
    predictions: Path
    references: Path
    records: int


def export_u2_bench(
    items: Sequence[Item], texts: Sequence[str], directory: Path, *, dataset: str, model: str
) -> list[Exported]:
    """Writes reports for the kit's `report`, and diagnoses and questions with options for its `cla`.

    Args:
        items: the records.
        texts: the model's answer to each.
        directory: where `report/`, `cla/` and `references/` go; it must not exist, or be empty.
        dataset, model: names of folders, as the kit shows them.

    Raises:
        InvalidDataError: a name is none for a folder, a reference is a text that the kit takes for a missing one, or
            there is nothing to export.
        InvalidCheckpointError: the folder is not empty.
    """
    for name in (dataset, model):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InvalidDataError("the names of dataset and model may hold letters, digits, '.', '_' and '-' only")
    reports, classes = [], []
    for item, text in zip(items, texts, strict=True):
        if item.kind == "text":
            reports.append((item, text, item.references[0]))
        elif (pair := _classified(item, text)) is not None:
            classes.append((item, pair[1] or UNKNOWN_CLASS, pair[0]))
    if not reports and not classes:
        raise InvalidDataError("there is neither a report nor a question with options: nothing can be exported")
    kinds = [("report", "caption", reports), ("cla", "classes", classes)]
    with new_folder(directory) as partial:
        written = [_write(rows, partial, task, column, dataset, model) for task, column, rows in kinds if rows]
    return [
        replace(
            each,
            predictions=directory / each.predictions.relative_to(partial),
            references=directory / each.references.relative_to(partial),
        )
        for each in written
    ]


def _classified(item: Item, text: str) -> tuple[str, str | None] | None:
    """The true class and the answer's class, as text."""
    judgement = judge(item, text)
    if judgement.choice is not None:
        truth, given = judgement.choice
        return truth, given
    if judgement.diagnosis is None:
        return None
    truth, given = judgement.diagnosis
    if item.attributes is None:
        return truth, given
    return _words(truth, item), given and _words(given, item)


def _words(named: str, item: Item) -> str:
    organ, _, class_name = named.partition(": ")
    return find_class(organ, class_name).diagnosis.written(item.language)[0]


def _write(
    rows: Sequence[tuple[Item, str, str]], directory: Path, task: str, column: str, dataset: str, model: str
) -> Exported:
    folder = directory / task / dataset / model
    folder.mkdir(parents=True, exist_ok=True)
    references = directory / "references" / f"{task}_{dataset}.tsv"
    references.parent.mkdir(parents=True, exist_ok=True)
    predictions = folder / PREDICTIONS_FILE
    with naming_file(predictions), predictions.open("w", encoding="utf-8") as file:
        for item, answer, _ in rows:
            line = {"id": item.id, "response": answer, "model": model, "question": item.request.prompt}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with naming_file(references), references.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "anatomy_location", column])
        for number, (item, _, truth) in enumerate(rows):
            if truth.strip().lower() in _MISSING:
                raise InvalidDataError(
                    f"the reference of exported record {number + 1} reads as a missing value in the kit: reword it"
                )
            writer.writerow([number, item.organ, truth])
    return Exported(task, predictions, references, len(rows))
