import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer

from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.demo_tokenizer import SPECIAL_TOKENS
from echovlm_ray.checkpoint.inspect import inspect
from echovlm_ray.checkpoint.layout import ORGANS, InvalidCheckpointError
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
    assert 5e6 < report.parameters < 20e6
    assert report.dtypes == ("F32",)
    assert report.description is not None
    assert "its text means nothing" in report.description


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
    assert len(tokenizer.encode("The thyroid lobes are symmetric")) < 8


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


def test_an_image_never_becomes_more_than_196_tokens(demo: Path) -> None:
    processor = json.loads((demo / "backbone" / "preprocessor_config.json").read_text())
    assert processor["max_pixels"] // (processor["patch_size"] * processor["merge_size"]) ** 2 == 196


def test_weights_are_random_and_finite_and_only_whole_characters_can_be_said(demo: Path) -> None:
    tensors = state_dict_of(demo / "backbone")
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1}
    assert all(tensor.isfinite().all() and tensor.std() > 0 for tensor in matrices.values())
    tokenizer = AutoTokenizer.from_pretrained(demo / "backbone")
    head = tensors["lm_head.weight"]
    silent = {token for token in range(len(tokenizer)) if not head[token].any()}
    assert set(tokenizer.all_special_ids) <= silent
    assert 0 < len(silent) < len(tokenizer) / 3
    for token in set(range(len(tokenizer))) - silent:
        assert "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode([token])
