"""The benchmarks' checkpoints: sound, the same every time, and with a tokenizer that fits."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.checkpoints import CONFIGS, BenchCheckpoint, bench_checkpoint
from benchmarks.tokenizer import FIELDS, UnsuitableVocabularyError, stretched_tokenizer
from echovlm_ray.checkpoint.layout import ORGANS, read_index
from echovlm_ray.checkpoint.merge import merge
from echovlm_ray.checkpoint.released import open_released
from echovlm_ray.checkpoint.split_folder import open_split
from tests.benchmarks.bench_configs import TINY, write_tiny_configs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BenchCheckpoint:
    directory = tmp_path_factory.mktemp("tiny")
    return bench_checkpoint("tiny", "float32", configs=write_tiny_configs(directory), folder=directory)


def files(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_is_sound_and_complete(tiny: BenchCheckpoint) -> None:
    assert not open_released(tiny.released).problems
    assert not open_split(tiny.split).problems
    index = read_index(tiny.split)
    assert (index.routing, tuple(entry.organ for entry in index.organs)) == ("organs", ORGANS)
    assert tiny.organs == ORGANS
    stored = load_file(tiny.released / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == tiny.num_parameters


def test_both_folders_hold_the_same_weights(tiny: BenchCheckpoint, tmp_path: Path) -> None:
    merge(tiny.split, tmp_path / "merged", organ="heart")
    merged, released = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", tiny.released))
    assert merged.keys() == released.keys()
    assert all(torch.equal(merged[name], released[name]) for name in merged)


def test_the_same_bytes_every_time(tiny: BenchCheckpoint, tmp_path: Path) -> None:
    again = bench_checkpoint("tiny", "float32", configs=write_tiny_configs(tmp_path), folder=tmp_path)
    assert files(again.released) == files(tiny.released)
    assert files(again.split) == files(tiny.split)


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    configs = write_tiny_configs(tmp_path)
    made = bench_checkpoint("tiny_partition", "bfloat16", configs=configs, folder=tmp_path)
    marker = made.released / "marker"
    marker.touch()
    written: list[tuple[int, int]] = []
    bench_checkpoint(
        "tiny_partition", "bfloat16", configs=configs, folder=tmp_path, progress=lambda *state: written.append(state)
    )
    assert marker.exists()
    assert not written


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    written: list[tuple[int, int]] = []
    bench_checkpoint(
        "tiny",
        "float32",
        configs=write_tiny_configs(tmp_path),
        folder=tmp_path,
        progress=lambda *state: written.append(state),
    )
    done, total = written[-1]
    # The split writes the gate's rows once for each organ's bundle, or once for all.
    assert done == pytest.approx(total, rel=0.05)


def test_seven_experts_become_a_partition_and_bfloat16_is_float32_rounded(tmp_path: Path) -> None:
    configs = write_tiny_configs(tmp_path)
    exact, rounded = (
        bench_checkpoint("tiny_partition", dtype, configs=configs, folder=tmp_path) for dtype in ("float32", "bfloat16")
    )
    assert read_index(rounded.split).routing == "flat"
    assert rounded.organs == ()
    assert [organ.manifest.num_experts for organ in open_split(rounded.split).organs.values()] == [1] * 7
    one, other = (load_file(made.released / "model.safetensors") for made in (exact, rounded))
    assert all(torch.equal(one[name].bfloat16(), other[name]) for name in one)


@pytest.mark.parametrize("config", [TINY, json.loads((CONFIGS / "config_4_experts.json").read_text())])
def test_the_tokenizer_has_the_configurations_special_tokens(config: dict[str, int]) -> None:
    tokenizer = stretched_tokenizer(config)
    vocabulary = tokenizer.get_vocab()
    assert {token: vocabulary[token] for token in FIELDS} == {token: config[field] for token, field in FIELDS.items()}
    assert max(vocabulary.values()) < config["vocab_size"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    text = "Ultrasound findings: 超声所见 ✓"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_transformers_reads_the_tokenizer(tiny: BenchCheckpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.released)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == TINY["image_token_id"]
    assert tokenizer.eos_token_id == TINY["eos_token_id"]
    assert max(tokenizer("Kidney, 肾. 23 mm")["input_ids"]) < TINY["vocab_size"]
    # What a random model says must become text too.
    assert str(tokenizer.decode([TINY["image_token_id"] - 1])).strip()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"eos_token_id": 20}, "in a row"),
        ({"vocab_size": 8186}, "below vocab_size"),
        ({field: 100 + index for index, field in enumerate(FIELDS.values())}, "move them up"),
    ],
)
def test_ids_that_cannot_be_given_are_refused(change: dict[str, int], reason: str) -> None:
    with pytest.raises(UnsuitableVocabularyError, match=reason):
        stretched_tokenizer(TINY | change)


def test_a_configuration_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config_none"):
        bench_checkpoint("none", "float32", configs=tmp_path, folder=tmp_path)
