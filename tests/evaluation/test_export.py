"""The export can be read with the functions of U2-BENCH's kit."""

import json
from pathlib import Path

import pandas
import pytest

from echovlm_ray.checkpoint.layout import InvalidCheckpointError
from echovlm_ray.data.record import InvalidDataError
from echovlm_ray.evaluation.export import export_u2_bench
from tests.data.records import record, turns, write_lines
from tests.evaluation.phantom_records import items_of, write_phantoms


def read_as_the_kit(folder: Path, task: str, dataset: str, references: Path) -> pandas.DataFrame:
    """`find_model_files` and `read_jsonl_with_tsv` of the kit, which join the two by the order of their rows."""
    (model,) = (entry for entry in (folder / task / dataset).iterdir() if entry.is_dir())
    (name,) = (entry.name for entry in model.iterdir() if entry.name.startswith("multimodal_test_results"))
    assert name.endswith(".jsonl")
    predictions = pandas.DataFrame([json.loads(line) for line in (model / name).read_text().splitlines()])
    table = pandas.read_csv(references, sep="\t")
    # With a column of that name the kit's classification would look for one that it has not made.
    assert "id" not in table.columns
    column = "caption" if task == "report" else "classes"
    return predictions.assign(reference=table[column].values)


def test_reports_and_classes_are_read_by_the_kit(tmp_path: Path) -> None:
    items = items_of(write_phantoms(tmp_path, 60))
    texts = [item.references[0] for item in items]
    texts[20] = "nothing of the kind"
    written = export_u2_bench(items, texts, tmp_path / "u2", dataset="39", model="echovlm-1.0")
    assert [(each.task, each.records) for each in written] == [("report", 20), ("cla", 40)]
    reports = read_as_the_kit(tmp_path / "u2", "report", "39", written[0].references)
    assert list(reports["response"]) == list(reports["reference"]) == texts[:10] + texts[30:40]
    assert reports["id"].is_unique
    classes = read_as_the_kit(tmp_path / "u2", "cla", "39", written[1].references)
    answers = classes["response"].str.lower() == classes["reference"].str.lower()
    assert list(answers).count(False) == 1
    assert classes["response"][10 if items[20].task == "vqa" else 0] is not None
    assert "unknown" in set(classes["response"])
    assert {"normal breast", "乳腺未见异常"} <= set(classes["reference"])


def test_line_breaks_and_tabs_stay_within_their_row(tmp_path: Path) -> None:
    texts = ["two\nlines", 'a "quoted"\tword', "三 行"]
    records = [
        record(f"r{number}", image=[f"{number}.png"], conversations=turns("<image>What?", text))
        for number, text in enumerate(texts)
    ]
    items = items_of(write_lines(tmp_path / "data.jsonl", records))
    (written,) = export_u2_bench(items, texts, tmp_path / "u2", dataset="x", model="m")
    read = read_as_the_kit(tmp_path / "u2", "report", "x", written.references)
    assert list(read["response"]) == list(read["reference"]) == texts


@pytest.mark.parametrize("names", [{"dataset": "../x", "model": "m"}, {"dataset": "x", "model": "a/b"}])
def test_names_stay_within_the_folder(names: dict[str, str], tmp_path: Path) -> None:
    items = items_of(write_lines(tmp_path / "data.jsonl", [record("r")]))
    with pytest.raises(InvalidDataError, match="letters, digits"):
        export_u2_bench(items, ["x"], tmp_path / "u2", **names)
    assert not (tmp_path / "u2").exists()


def test_what_the_kit_takes_for_missing_is_refused(tmp_path: Path) -> None:
    items = items_of(write_lines(tmp_path / "data.jsonl", [record("r", conversations=turns("<image>What?", "None"))]))
    with pytest.raises(InvalidDataError, match="missing value"):
        export_u2_bench(items, ["x"], tmp_path / "u2", dataset="x", model="m")


def test_an_export_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    items = items_of(write_lines(tmp_path / "data.jsonl", [record("r")]))
    (written,) = export_u2_bench(items, ["first"], tmp_path / "u2", dataset="x", model="m")
    before = written.predictions.read_bytes()
    with pytest.raises(InvalidCheckpointError, match="is not empty; give a new folder"):
        export_u2_bench(items, ["second"], tmp_path / "u2", dataset="y", model="m")
    assert written.predictions.read_bytes() == before
    assert not (tmp_path / "u2" / "report" / "y").exists()
