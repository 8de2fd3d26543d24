"""Curves in TensorBoard and MLflow, as their own readers find them."""

import struct
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.training.test_run import new_run, train

STAGE = {"name": "all", "steps": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 3e-3}
DATA = {"max_tokens": 512, "max_visual_tokens": 16, "validation_share": 0.2}


def test_tensorboard_gets_both_losses_and_the_experts_load(start: Path, records: Path, tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    options = new_run(tmp_path / "run", start, records, stages=[STAGE], data=DATA, tracker="tensorboard")
    code, _, errors = train(*options)
    assert code == 0, errors
    (path,) = (tmp_path / "run" / "1-all").rglob("events.out.tfevents.*")
    content, tags, place = path.read_bytes(), set(), 0
    while place < len(content):
        # TFRecord: length, checksum of the length, the event, its checksum.
        (length,) = struct.unpack_from("<Q", content, place)
        event = Event.FromString(content[place + 12 : place + 12 + length])
        tags |= {value.tag for value in event.summary.value}
        place += 12 + length + 4
    assert {
        "train/answer_loss",
        "train/balancing_loss",
        "train/load/layer_0/expert_0",
        "train/gate_entropy/layer_1",
        "eval/token_accuracy",
    } <= tags


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not among this project's dependencies")
def test_mlflow_gets_them_in_a_file_store(
    start: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    options = new_run(tmp_path / "run", start, records, stages=[STAGE], data=DATA, tracker="mlflow")
    code, _, errors = train(*options)
    assert code == 0, errors
    found = {path.name for path in (tmp_path / "store").glob("*/*/metrics/*")}
    assert {"answer_loss", "balancing_loss", "eval_token_accuracy"} <= found


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not among this project's dependencies")
def test_a_store_that_cannot_be_written_to_ends_clearly(
    start: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://there")
    code, _, errors = train(*new_run(tmp_path / "run", start, records, stages=[STAGE], tracker="mlflow"))
    assert code == 1
    assert "mlflow cannot be written to" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed")
def test_a_tracker_that_is_not_installed_is_named_before_a_run_begins(
    start: Path, records: Path, tmp_path: Path
) -> None:
    code, _, errors = train(*new_run(tmp_path / "run", start, records, stages=[STAGE], tracker="mlflow"))
    assert code == 2
    assert "`pip install mlflow`, or set tracker to none" in " ".join(errors.split())
    assert not (tmp_path / "run").exists()
