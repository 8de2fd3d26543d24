import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from echovlm_ray.checkpoint.schema import is_routed
from echovlm_ray.cli.experts import app
from experts.bundles.bundle import Bundle
from experts.bundles.signing import check_signature
from tests.checkpoint.support import make_split, state_dict_of
from tests.experts.bad_bundles import flip_last_byte
from tests.experts.keys import make_keys

COMMANDS = ("pack", "verify", "sign", "show", "diff", "push", "pull", "list", "backup", "restore")
CARD = "authors: we\nlicense: MIT\nintended_use: tests\ndescription: trained on nothing\neval_metrics: {bleu1: 0.25}\n"
Pack = Callable[..., Path]


def echoray(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: object) -> str:
    result = echoray(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def refused(*arguments: object, code: int = 1) -> str:
    """Runs a command that must fail with one line on stderr and nothing else."""
    result = echoray(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, golden_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "split"
    make_split(golden_dir / "base" / "checkpoint", directory, organs=("breast", "liver"))
    return directory


@pytest.fixture
def pack(checkpoint: Path, golden_dir: Path, tmp_path: Path) -> Pack:
    """Packs a training's output, as a user would."""

    def make(name: str = "bundle", version: str = "1.1.0", scale: float = 1.01, *options: object) -> Path:
        tensors = state_dict_of(golden_dir / "base" / "checkpoint")
        trained = {name: tensor * scale for name, tensor in tensors.items() if is_routed(name)}
        save_file(trained, tmp_path / "trained.safetensors")
        (tmp_path / "card.yaml").write_text(CARD)
        arguments = ("--organ", "breast", "--version", version, "--checkpoint", checkpoint)
        text = done(
            "pack",
            tmp_path / "trained.safetensors",
            tmp_path / name,
            *arguments,
            "--card",
            tmp_path / "card.yaml",
            *options,
        )
        assert f"Packed breast@{version} into" in text
        return tmp_path / name

    return make


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command: str) -> None:
    text = done(command, "--help")
    assert f"Example: echoray experts {command}" in text


def test_the_command_line_is_light_until_it_works() -> None:
    code = (
        "import sys, echovlm_ray.cli.experts; "
        "print(*sorted({'torch', 'ray', 'transformers', 'model_signing'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""


def test_pack_says_what_its_options_say(pack: Pack) -> None:
    directory = pack(
        "bundle",
        "2.0.0-rc.1",
        1.0,
        *("--name", "breast large", "--metric", "rouge=0.5", "--metric", "bleu1=0.3", "--reference", "https://x"),
        *("--synonym", "mamma", "--changelog", "from scratch", "--training-data", "12 studies", "--authors", "they"),
        *("--dtype", "bfloat16", "--experts", "2,0"),
    )
    manifest = Bundle.open(directory).manifest
    assert (manifest.name, manifest.version, manifest.authors) == ("breast large", "2.0.0-rc.1", "they")
    assert (manifest.license, manifest.description) == ("MIT", "trained on nothing")
    assert manifest.eval_metrics == {"bleu1": 0.3, "rouge": 0.5}
    assert (manifest.references, manifest.organ_synonyms) == (("https://x",), ("mamma",))
    assert manifest.changelog == {"2.0.0-rc.1": "from scratch"}
    assert (manifest.dtype, manifest.num_experts, manifest.probe is not None) == ("bfloat16", 2, True)


def test_pack_refuses_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("pack", checkpoint, tmp_path / "b", "--organ", "breast", "--checkpoint", checkpoint)
    assert "the manifest needs version: give --version" in refused(*arguments)
    assert "NAME=VALUE" in refused(*arguments, "--metric", "bleu1", code=2)
    assert "NAME=VALUE" in refused(*arguments, "--metric", "bleu1=high", code=2)
    assert "--experts '1-2' must be numbers" in refused(*arguments, "--experts", "1-2", code=2)
    assert "--dtype 'float8' must be one of" in refused(*arguments, "--dtype", "float8", code=2)
    assert "--max-file-size 'much' is no size" in refused(*arguments, "--max-file-size", "much", code=2)
    assert "the checkpoint has no organ 'lung'" in refused(*arguments, "--version", "1.0.0", "--from-organ", "lung")
    assert list(tmp_path.iterdir()) == []


# Packs, and stops in the middle of it until it is signalled.
STALLED = """
import sys, time
from contextlib import contextmanager
import echovlm_ray.cli.experts_bundles as bundles
from echovlm_ray.cli.experts import app

@contextmanager
def stalling(what):
    total, done = [0], [0]
    def advance(count):
        done[0] += count
        if done[0] * 3 > total[0]:
            print("stalled", flush=True)
            time.sleep(60)
    yield (lambda count: total.__setitem__(0, count)), advance

bundles.byte_progress = stalling
app(sys.argv[1:])
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_packing_that_is_stopped_half_way(checkpoint: Path, tmp_path: Path, stop: signal.Signals) -> None:
    command = ["pack", str(checkpoint), str(tmp_path / "b"), "--organ", "breast", "--version", "1.0.1"]
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, *command, "--checkpoint", str(checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stalled\n"
    process.send_signal(stop)
    _, errors = process.communicate(timeout=20)
    if stop == signal.SIGKILL:
        # At most a hidden folder, which is no bundle by its name.
        assert all(path.name.startswith(".b.") for path in tmp_path.iterdir())
    else:
        assert process.returncode == 130
        assert errors == "error: interrupted; nothing was left behind\n"
        assert list(tmp_path.iterdir()) == []
    done(*command, "--checkpoint", checkpoint)


def test_a_split_source_is_its_own_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    text = done("pack", checkpoint, tmp_path / "own", "--organ", "breast", "--version", "3.0.0")
    assert "Packed breast@3.0.0" in text
    done("verify", tmp_path / "own", "--checkpoint", checkpoint)


def test_a_source_that_says_no_backbone_asks_for_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained").mkdir()
    text = refused("pack", "trained", tmp_path / "b", "--organ", "breast", "--version", "1.0.0", code=2)
    assert "give the split checkpoint with --checkpoint" in text


def test_verify_a_good_bundle(pack: Pack, checkpoint: Path) -> None:
    directory = pack()
    text = done("verify", directory, "--checkpoint", checkpoint)
    assert "The bundle is good." in text
    assert "kernel auto: cpu_packed in float32" in text
    found = json.loads(echoray("verify", directory, "--kernel", "reference", "--dtype", "bfloat16", "--json").stdout)
    assert (found["ok"], found["kernel"], found["dtype"]) == (True, "reference", "bfloat16")
    assert found["probe_recorded"] is True


def test_verify_says_what_is_wrong(pack: Pack, checkpoint: Path, demo_checkpoint: Path, tmp_path: Path) -> None:
    directory = pack()
    assert "was trained against the backbone" in refused("verify", directory, "--checkpoint", demo_checkpoint)
    assert "is not signed" in refused("verify", directory, "--key", tmp_path / "x.pub")
    flip_last_byte(directory)
    assert "experts.safetensors: is damaged" in refused("verify", directory)
    result = echoray("verify", directory, "--json")
    assert result.exit_code == 1
    assert "is damaged" in json.loads(result.stdout)["reason"]
    assert "neither a bundle's folder nor ORGAN@VERSION" in refused("verify", tmp_path / "absent", code=2)
    assert "--device 'tpu'" in refused("verify", directory, "--device", "tpu", code=2)
    assert "more than 1 bytes of memory" in refused("verify", pack("other"), "--memory", "1B")


def test_signing(pack: Pack, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    _, other = make_keys(tmp_path, "other")
    directory = pack("signed", "1.1.0", 1.0, "--sign-with", private)
    check_signature(Bundle.open(directory), public)
    assert "verified" in done("verify", directory, "--key", other, "--key", public)
    assert "Key mismatch" in refused("verify", directory, "--key", other)
    later = pack("later", "1.2.0")
    assert "The bundle is good." in done("verify", later, "--key", public, "--allow-unsigned")
    assert "Signed:" in done("sign", later, "--key", private)
    assert "verified" in done("verify", later, "--key", public)
    assert "cannot be used" in refused("sign", later, "--key", public)


def test_push_list_show_pull(pack: Pack, checkpoint: Path, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    directory = pack("signed", "1.1.0", 1.0, "--sign-with", private)
    registry = ("--registry", tmp_path / "registry")
    assert done("list", *registry) == "There are no bundles."
    digest = Bundle.open(directory).digest
    for _ in range(2):
        assert done("push", directory, *registry).endswith(digest)
    assert "raise the version" in refused("push", pack("other", "1.1.0", 3.0), *registry)
    text = done("list", *registry)
    assert "breast" in text
    assert digest[:12] in text
    listed = json.loads(echoray("list", *registry, "--json").stdout)
    assert [(row["organ"], row["version"], row["digest"], row["signed"]) for row in listed] == [
        ("breast", "1.1.0", digest, True)
    ]
    assert "there is no organ 'liver' in the registry" in refused("list", *registry, "--organ", "liver", code=2)
    shown = done("show", "breast@1.1.0", *registry)
    assert "trained on nothing" in shown
    assert "bleu1: 0.25" in shown
    assert json.loads(echoray("show", "breast@1.1.0", *registry, "--json").stdout)["digest"] == digest
    assert "verified" in done("verify", "breast@1.1.0", *registry, "--key", public)
    done("pull", "breast@1.1.0", tmp_path / "new" / "pulled", *registry)
    assert Bundle.open(tmp_path / "new" / "pulled").digest == digest
    check_signature(Bundle.open(tmp_path / "new" / "pulled"), public)
    assert "exists" in refused("pull", "breast@1.1.0", tmp_path / "new" / "pulled", *registry)
    assert "has no version '9.0.0' of organ 'breast'; it has 1.1.0" in refused("show", "breast@9.0.0", *registry)
    assert "it has none of it, and bundles of breast" in refused("show", "spleen@1.0.0", *registry)
    (tmp_path / "file").write_text("")
    assert "is no folder" in refused("list", "--registry", tmp_path / "file")
    assert "is not ORGAN@VERSION" in refused("pull", "breast", tmp_path / "x", *registry, code=2)
    # A checkpoint's own registry goes by the checkpoint's name.
    own = json.loads(echoray("list", "--registry", checkpoint, "--json").stdout)
    assert [row["organ"] for row in own] == ["breast", "liver"]


def test_diff(pack: Pack, checkpoint: Path) -> None:
    registry = ("--registry", checkpoint)
    after = pack("after", "1.1.0", 1.5)
    text = done("diff", "breast@1.0.0", after, *registry)
    assert "0 of 4 experts are equal in every bit." in text
    assert "0.5 (expert" in text
    found = json.loads(echoray("diff", "breast@1.0.0", after, *registry, "--json").stdout)
    assert found["same_weights"] is False
    assert [layer["experts"] for layer in found["layers"]] == pytest.approx([0.5] * 4)
    assert "version" in {change["field"] for change in found["fields"]}
    assert "They are the same bundle." in done("diff", "breast@1.0.0", "breast@1.0.0", *registry)
    assert "All weights are equal in every bit." in done("diff", "breast@1.0.0", "liver@1.0.0", *registry)
    fewer = pack("fewer", "1.2.0", 1.0, "--experts", "1,2,3")
    text = done("diff", "breast@1.0.0", fewer, *registry)
    assert "Experts removed: 0" in text
    assert "1 → 0, 2 → 1, 3 → 2" in text


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="models")
    yield f"http://{host}:{port}"
    server.stop()


def test_a_registry_in_s3(pack: Pack, s3: str, tmp_path: Path) -> None:
    registry = ("--registry", "s3://models/experts", "--registry-option", f"endpoint_url={s3}")
    digest = Bundle.open(directory := pack()).digest
    assert done("push", directory, *registry).endswith(digest)
    # The checking process reaches the same server.
    assert json.loads(echoray("verify", "breast@1.1.0", *registry, "--json").stdout)["digest"] == digest
    assert len(list((tmp_path / "home-cache" / "echovlm-ray" / "files").glob("*.safetensors"))) == 3
    assert "must be KEY=VALUE" in refused("list", *registry, "--registry-option", "endpoint", code=2)
    assert "cannot be reached" in refused("list", "--registry", "nowhere://x")


def test_the_program_itself(demo_checkpoint: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("echoray")
    environment = {**os.environ, "ECHORAY_REGISTRY": str(demo_checkpoint), "OMP_NUM_THREADS": "1"}
    listed = subprocess.run(
        [program, "experts", "list", "--registry", demo_checkpoint, "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert len([row for row in json.loads(listed.stdout) if row["version"] == "1.0.0"]) == 7
    packed = tmp_path / "b"
    command = ["pack", demo_checkpoint, packed, "--organ", "heart", "--version", "1.0.1"]
    subprocess.run(
        [program, "experts", *map(str, command), "--checkpoint", demo_checkpoint],
        capture_output=True,
        check=True,
        env=environment,
    )
    weights = load_file(packed / "experts.safetensors")
    assert len(weights) == 4 * 4 * 3
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
