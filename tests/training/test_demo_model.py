"""The demo's training, a few steps of it: what comes out can be made a checkpoint and served."""

from pathlib import Path

from safetensors.torch import load_file

from echovlm_ray.checkpoint.demo import DemoAbout, write_demo
from echovlm_ray.checkpoint.inspect import inspect
from echovlm_ray.checkpoint.layout import ORGANS
from echovlm_ray.training.demo_model import train_demo

FEW = ["data.phantoms.pictures=48", "data.phantoms.loops=1", "data.validation_share=0", "data.workers=0"]
SHORT = {
    "demo": [*FEW, "stages.0.steps=2", "stages.1.steps=2", "stages.1.batch_size=4", "stages.1.micro_batch_size=4"],
    "demo-expert": [*FEW, "stages.0.steps=2", "data.phantoms.examples_each=1"],
}


def test_two_runs_make_a_demo_and_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    made = train_demo(tmp_path / "work", changes=SHORT, threads=1, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert train_demo(tmp_path / "work", threads=1, quiet=True) == made
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in ("curves-look.png", "curves-speak.png", "recipe.yaml", "recipe-breast-1.1.0.yaml"):
        assert (made / name).is_file(), name
    about = DemoAbout.model_validate_json((made / "about.json").read_bytes())
    assert [bundle.organ for bundle in about.bundles if bundle.served] == list(ORGANS)
    (tmp_path / "demo").mkdir()
    index = write_demo(made, tmp_path / "demo", about)
    assert inspect(tmp_path / "demo").problems == ()
    assert index.entry("breast").version == "1.1.0"
    shared, special = (load_file(made / f"{name}.safetensors") for name in ("experts-1.0.0", "breast-1.1.0"))
    assert shared.keys() == special.keys()
    assert any(not shared[name].equal(special[name]) for name in shared)
