import hashlib
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from echovlm_ray.checkpoint.demo import demo_files, make_demo
from echovlm_ray.checkpoint.demo_tokenizer import SPECIAL_TOKENS
from echovlm_ray.checkpoint.inspect import inspect
from echovlm_ray.checkpoint.layout import ORGANS, InvalidCheckpointError, read_index, registry_root
from experts.registry.registry import Registry
from tests.checkpoint.support import make_split, state_dict_of


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    _, made = make_demo(directory)
    assert made
    return directory


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_same_bytes_in_another_process(demo: Path, tmp_path: Path) -> None:
    """With other hash seeds and thread counts, which are what makes runs differ."""
    code = "import pathlib, sys, echovlm_ray.checkpoint.demo as demo; demo.make_demo(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "RAYON_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=environment, timeout=120)
    assert digests(tmp_path / "again") == digests(demo)


def test_loading_no_transformers_keeps_it_fast() -> None:
    code = "import sys, echovlm_ray.checkpoint.demo; print('transformers' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert loaded.stdout.strip() == "False"


def test_it_is_a_sound_split_checkpoint_that_says_what_it_is(demo: Path) -> None:
    report = inspect(demo)
    assert report.problems == ()
    assert tuple(organ.organ for organ in report.organs) == ORGANS
    assert 3e6 < report.parameters < 20e6
    assert report.dtypes == ("F32",)
    assert report.description is not None
    assert "synthetic" in report.description
    assert "Not a medical device" in report.description


def test_a_demo_that_is_there_is_left_alone(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    index, made = make_demo(demo)
    assert not made
    assert index.name == "echovlm-demo"
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_other_folders_are_refused(base_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(InvalidCheckpointError, match="is not empty"):
        make_demo(tmp_path / "mine")
    make_split(base_checkpoint, tmp_path / "split", organs=("breast",))
    with pytest.raises(InvalidCheckpointError, match=r"holds another checkpoint \(test 1\.0\.0\)"):
        make_demo(tmp_path / "split")


def test_a_damaged_demo_is_not_passed_off_as_one(tmp_path: Path) -> None:
    make_demo(tmp_path / "demo")
    (tmp_path / "demo" / "backbone" / "model.safetensors").unlink()
    with pytest.raises(InvalidCheckpointError, match="damaged demo"):
        make_demo(tmp_path / "demo")


@pytest.mark.parametrize("tokenizer_class", ["AutoTokenizer", "Qwen2TokenizerFast"])
@pytest.mark.parametrize(
    "text",
    [
        "The liver is 12.5 cm long; don't worry!\n\n  Second line.",
        "肝脏体积增大，未见明显异常。甲状腺右叶见低回声结节，约 8 毫米。",
        "Unseen scripts: ñ, 日本語, العربية, 🎉",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n",
    ],
)
def test_text_survives_the_tokenizer_that_transformers_loads(demo: Path, tokenizer_class: str, text: str) -> None:
    tokenizer = getattr(transformers, tokenizer_class).from_pretrained(demo / "backbone")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_and_config_agree(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "backbone")
    config = json.loads((demo / "backbone" / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    ids = {token: tokenizer.encode(token) for token in SPECIAL_TOKENS}
    assert all(len(encoded) == 1 for encoded in ids.values())
    for field, token in {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "eos_token_id": "<|im_end|>",
        "pad_token_id": "<|endoftext|>",
    }.items():
        assert [config[field]] == ids[token]
    generation = json.loads((demo / "backbone" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [config["eos_token_id"], config["pad_token_id"]]
    # It has learnt both languages' words: several characters a token.
    assert len(tokenizer.encode("甲状腺未见明显异常")) < 9
    assert len(tokenizer.encode("Ultrasound impression: calcified plaque")) < 8


def test_chat_template_puts_pictures_first(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "backbone")
    content = [{"type": "text", "text": "Describe."}, {"type": "image"}, {"type": "video"}]
    question = {"role": "user", "content": content}

    def render(*messages: dict[str, Any], answer: bool = False) -> Any:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)

    assert render(question, {"role": "assistant", "content": "A cyst."}, answer=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>"
        "Describe.<|im_end|>\n<|im_start|>assistant\nA cyst.<|im_end|>\n<|im_start|>assistant\n"
    )
    text = render({"role": "system", "content": "Be brief."}, question)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("Describe.<|im_end|>\n")


def test_an_image_becomes_as_many_tokens_as_it_was_trained_with(demo: Path) -> None:
    processor = json.loads((demo / "backbone" / "preprocessor_config.json").read_text())
    assert processor["max_pixels"] // (processor["patch_size"] * processor["merge_size"]) ** 2 == 64
    assert processor["min_pixels"] == processor["max_pixels"]


def test_the_breast_has_two_versions_and_the_second_is_served(demo: Path) -> None:
    registry, index = Registry(registry_root(demo)), read_index(demo)
    assert {entry.organ: entry.version for entry in index.organs} == {
        organ: "1.1.0" if organ == "breast" else "1.0.0" for organ in ORGANS
    }
    first, second = (registry.open(registry.find("breast", version).digest) for version in ("1.0.0", "1.1.0"))
    assert "breast/simple_cyst" in first.manifest.description
    for layer in range(first.manifest.num_layers):
        assert not torch.equal(first.load_layer(layer).down_EDF, second.load_layer(layer).down_EDF)
        assert not torch.equal(first.gate_ED(layer), second.gate_ED(layer))


def test_prototypes_tell_the_organs_apart(demo: Path) -> None:
    registry = Registry(registry_root(demo))
    found = [registry.open(entry.bundle_digest).prototype() for entry in read_index(demo).organs]
    directions = torch.nn.functional.normalize(
        torch.stack([prototype for prototype in found if prototype is not None]), dim=-1
    )
    assert len(directions) == len(ORGANS)
    likeness = directions @ directions.T - torch.eye(len(ORGANS))
    assert likeness.max() < 0.8


def test_weights_are_finite_and_were_kept_in_half_the_bytes(demo: Path) -> None:
    tensors = state_dict_of(demo / "backbone")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())
    with resources.as_file(demo_files()) as folder:
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 18e6
