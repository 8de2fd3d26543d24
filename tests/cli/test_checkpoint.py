import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from echovlm_ray.checkpoint.layout import ORGANS, read_index
from echovlm_ray.cli.checkpoint import _DEFAULT_ORGANS, app
from tests.checkpoint.support import Edit, bit_identical, state_dict_of


@pytest.fixture
def source(golden_dir: Path) -> Path:
    return golden_dir / "base" / "checkpoint"


def echoray(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object, code: int = 1) -> str:
    """Runs a command that must fail with one line on stderr and nothing else."""
    result = echoray(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_default_organs_are_the_seven() -> None:
    assert tuple(_DEFAULT_ORGANS.split(",")) == ORGANS


def test_the_command_line_is_light_until_it_works() -> None:
    code = "import sys, echovlm_ray.cli.checkpoint; print(*sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


@pytest.mark.parametrize("command", ["inspect", "split", "merge", "demo"])
def test_help_teaches_with_an_example(command: str) -> None:
    result = echoray(command, "--help")
    assert result.exit_code == 0
    assert f"Example: echoray checkpoint {command}" in " ".join(result.stdout.split())


def test_inspect_for_people(source: Path) -> None:
    result = echoray("inspect", source)
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "is an EchoVLM in the released layout" in text
    assert "4 layers · 4 experts, top 2 · 1 weight file" in text
    assert "routed experts 147,456" in text
    assert "Nothing is wrong with it." in text


def test_inspect_for_programs(source: Path) -> None:
    report = json.loads(echoray("inspect", source, "--json").stdout)
    assert report["kind"] == "released"
    assert report["problems"] == []
    assert {part["part"]: part["parameters"] for part in report["parts"]}["gates"] == 1024


def test_inspect_exits_1_when_something_is_wrong(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    Edit(tmp_path).tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".mlp." in name])
    result = echoray("inspect", tmp_path)
    assert result.exit_code == 1
    assert "wrong: model.layers.0.mlp.gate_proj.weight: missing" in " ".join(result.stdout.split())
    assert "--json lists them all" in result.stdout
    as_json = echoray("inspect", tmp_path, "--json")
    assert as_json.exit_code == 1
    assert len(json.loads(as_json.stdout)["problems"]) > 12


def test_inspect_of_a_split_checkpoint_shows_its_organs(source: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups.json"
    groups.write_text('{"heart": [0, 2], "liver": [1, 3]}')
    assert echoray("split", source, tmp_path / "split", "--groups", groups).exit_code == 0
    text = " ".join(echoray("inspect", tmp_path / "split").stdout.split())
    assert "heart 1.0.0 2 (0, 2)" in text
    assert "liver 1.0.0 2 (1, 3)" in text


def test_split_and_merge(source: Path, tmp_path: Path) -> None:
    labels = ("--name", "tiny", "--version", "2.1.0", "--description", "A test.", "--license", "MIT", "--authors", "us")
    split = echoray("split", source, tmp_path / "split", *labels)
    assert split.exit_code == 0, split.stderr
    assert f"Next: echoray serve --checkpoint {tmp_path / 'split'}" in split.stdout
    assert split.stderr == ""
    index = read_index(tmp_path / "split")
    assert (index.name, index.version, index.description) == ("tiny", "2.1.0", "A test.")
    assert index.expert_set().organs == ORGANS
    manifest = json.loads((tmp_path / "split/registry/bundles/liver/2.1.0/manifest.json").read_text())
    assert (manifest["license"], manifest["authors"], manifest["name"]) == ("MIT", "us", "tiny-liver")
    merged = echoray("merge", tmp_path / "split", tmp_path / "merged", "--max-shard-size", "500KB")
    assert merged.exit_code == 0, merged.stderr
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) == 6
    assert bit_identical(state_dict_of(tmp_path / "merged"), state_dict_of(source))
    assert echoray("merge", tmp_path / "split", tmp_path / "liver", "--organ", "liver").exit_code == 0


def test_split_for_named_organs(source: Path, tmp_path: Path) -> None:
    assert echoray("split", source, tmp_path / "split", "--organs", "liver, breast").exit_code == 0
    assert read_index(tmp_path / "split").expert_set().organs == ("liver", "breast")


def test_split_says_what_it_left_behind(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((source / name).read_bytes())
    (copy / "modeling.py").touch()
    result = echoray("split", copy, tmp_path / "split")
    assert result.stderr == "Not copied, since nothing reads them: modeling.py\n"


def test_split_refusals(source: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups.yaml"
    groups.write_text("liver: [0, 1]\nheart: [1, 2, 3]\n")
    new = tmp_path / "split"
    assert "expert 1 is in the groups liver and heart" in refused("split", source, new, "--groups", groups)
    both = ("--groups", groups, "--organs", "liver")
    assert "give one of the two" in refused("split", source, new, *both, code=2)
    assert "No such file" in refused("split", source, new, "--groups", tmp_path / "none.yaml")
    assert "named twice" in refused("split", source, new, "--organs", "liver,liver")
    assert "no organs" in refused("split", source, new, "--organs", ",")
    assert "semantic version" in refused("split", source, new, "--version", "new")
    assert "is no size" in refused("split", source, new, "--max-shard-size", "big", code=2)
    assert "at least one byte" in refused("split", source, new, "--max-shard-size", "0", code=2)
    assert "is not a folder" in refused("split", tmp_path / "none", new)
    assert "is not empty" in refused("split", source, tmp_path)
    assert not new.exists()


def test_merge_refusals(source: Path, tmp_path: Path) -> None:
    assert "split it first" in refused("merge", source, tmp_path / "merged")
    assert "is not a folder" in refused("merge", tmp_path / "none", tmp_path / "merged")


def test_a_disk_that_refuses_is_one_line(source: Path) -> None:
    assert "/proc/" in refused("split", source, "/proc/nothing/split")


def test_demo(tmp_path: Path) -> None:
    first = echoray("demo", tmp_path / "demo")
    assert first.exit_code == 0, first.stderr
    assert "has never seen a patient" in first.stdout
    second = echoray("demo", tmp_path / "demo")
    assert second.exit_code == 0
    assert "already; nothing to do" in second.stdout
    assert "is not empty" in refused("demo", tmp_path)
