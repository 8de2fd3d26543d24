"""Several workers through Ray, on a CPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echovlm_ray.training.errors import TrainingError
from echovlm_ray.training.run import Run, begin_run, train_stages
from echovlm_ray.training.sources import DataFiles
from echovlm_ray.training.start import find_start
from echovlm_ray.training.state import last_checkpoint
from tests.training.support import recipe, write_records


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def run_with(folder: Path, start: Path, records: Path, workers: int, steps: int = 3) -> Path:
    stage = {"name": "all", "steps": steps, "batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2}
    chosen = recipe(stages=[{**stage, "weight_decay": 0.0}], loss={"balancing": 0.1})
    run = Run(kind="model", start=find_start(start, fresh=True), files=DataFiles(train=(records,)))
    begin_run(folder, run, chosen)
    return train_stages(folder, run, chosen, workers=workers, device="cpu", threads=1, quiet=True)


def test_two_workers_train_as_one_does_even_when_one_of_them_sees_no_picture(start: Path, tmp_path: Path) -> None:
    # With a micro-batch of one, a worker often has a record without a picture while the other has one with.
    records = write_records(tmp_path / "records", 12, without_image=(0, 2, 3, 5, 7, 8, 11))
    one, two = (load_file(run_with(tmp_path / f"w{n}", start, records, n) / "model.safetensors") for n in (1, 2))
    logs = [[json.loads(line) for line in (tmp_path / f"w{n}" / "1-all" / "log.jsonl").open()][:3] for n in (1, 2)]
    # What is logged is that of the whole step, of all workers together.
    for alone, together in zip(*logs, strict=True):
        for name in ("loss", "answer_loss", "balancing_loss", "gate_entropy/layer_0", "load/layer_1/expert_1"):
            assert together[name] == pytest.approx(alone[name], rel=1e-2, abs=1e-2), name
    before = load_file(run_with(tmp_path / "short", start, records, 1, steps=1) / "model.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4, msg=name)
    assert any(not torch.allclose(before[name], value, atol=2e-3) for name, value in one.items())


def test_what_ends_a_worker_is_said(start: Path, tmp_path: Path) -> None:
    records = write_records(tmp_path / "records", 12)
    (tmp_path / "records" / "train.json-4.png").unlink()
    with pytest.raises(TrainingError, match=r"a worker failed: .*image 1 of 1 does not exist.*--resume"):
        run_with(tmp_path / "run", start, records, 2)
    checkpoint = last_checkpoint(tmp_path / "run" / "1-all")
    assert checkpoint is None or checkpoint.name in ("checkpoint-2",)


def test_what_would_wait_for_ever_is_refused(start: Path, records: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be divided among 3 workers"):
        run_with(tmp_path / "three", start, records, 3)
    with pytest.raises(TrainingError, match="4 workers need a CPU each and there are 2"):
        run_with(tmp_path / "four", start, records, 4)
