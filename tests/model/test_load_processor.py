"""What serves requests reads a checkpoint's files without transformers, and computes what transformers would."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.checkpoint.layout import backbone_directory
from echovlm_ray.model.load_processor import load_request_processor
from echovlm_ray.model.picture_settings import PictureSettings
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.model.request_processor import RequestProcessor
from echovlm_ray.model.text_tokens import CONTROL_TOKENS, read_tokenizer

PROMPTS = st.lists(st.sampled_from([*CONTROL_TOKENS, "<|endoftext|>", " ", "\n", "é", "e\u0301"]) | st.text()).map(
    "".join
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    make_demo(directory)
    return directory


@pytest.fixture(scope="module")
def light(demo: Path) -> RequestProcessor:
    return load_request_processor(demo)


@pytest.fixture(scope="module")
def whole(demo: Path) -> EchoVLMProcessor:
    return EchoVLMProcessor.from_pretrained(demo)


def changed(demo: Path, directory: Path, name: str, values: dict[str, Any]) -> Path:
    """A copy of the backbone's text files with other values in one of them; None takes one out."""
    shutil.copytree(backbone_directory(demo), directory, ignore=shutil.ignore_patterns("*.safetensors"))
    path = directory / name
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return directory


def test_the_demos_files_need_no_transformers(light: RequestProcessor) -> None:
    assert type(light) is RequestProcessor


@given(PROMPTS)
@example("a <|im_end|>\n<|im_start|>system")
def test_text_has_the_ids_that_transformers_gives_it(
    light: RequestProcessor, whole: EchoVLMProcessor, text: str
) -> None:
    ids = light.encode_text(text)
    assert ids == whole.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    decoded = whole.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert light.decode(ids) == decoded


@given(st.lists(st.integers(0, 600)))
def test_any_ids_have_the_text_that_transformers_gives_them(
    light: RequestProcessor, whole: EchoVLMProcessor, ids: list[int]
) -> None:
    decoded = whole.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert light.decode(ids) == decoded


@pytest.mark.parametrize("values", [{}, {"image_mean": [0.5, 0.25, 0.1], "image_std": [0.3, 0.2, 0.7]}])
def test_bytes_become_what_transformers_makes_of_them(demo: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    folder = changed(demo, tmp_path / "own", "preprocessor_config.json", values)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    pixels = np.arange(56 * 28 * 3).astype(np.uint8).reshape(56, 28, 3)
    expected = image_processor(images=pixels, do_resize=False, input_data_format="channels_last", return_tensors="np")
    found = load_request_processor(folder).scaled_patches([pixels], is_video=False)
    assert np.array_equal(found.patches, expected["pixel_values"])
    assert found.grid == tuple(expected["image_grid_thw"][0])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"size": None},
        {"min_pixels": None, "max_pixels": None},
        {"min_pixels": 6272, "max_pixels": 10**6, "size": None},
        {"size": {"shortest_edge": 6272}, "min_pixels": None, "max_pixels": None},
        # As transformers 4 wrote it, and so the released checkpoint has it.
        {"size": {"min_pixels": 3136, "max_pixels": 10**6}},
        {"size": {"min_pixels": 3136, "max_pixels": 10**6}, "min_pixels": None, "max_pixels": None},
        {"image_mean": None, "image_std": None, "rescale_factor": None, "resample": None},
        {"image_mean": 0.5, "image_std": 0.25},
        {"patch_size": 16, "merge_size": 1},
    ],
)
def test_settings_are_those_of_transformers(demo: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    folder = changed(demo, tmp_path / "own", "preprocessor_config.json", values)
    assert PictureSettings.read(folder) == PictureSettings.of(Qwen2VLImageProcessorPil.from_pretrained(folder))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("preprocessor_config.json", {"size": {"shortest_edge": 1, "width": 224}}),
        ("preprocessor_config.json", {"size": {"height": 224, "width": 224}}),
        ("preprocessor_config.json", {"image_mean": [0.5]}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("tokenizer_config.json", {"pad_token": "<|pad|>"}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|new|>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {}}),
        ("tokenizer.json", {"normalizer": {"type": "NFD"}}),
        ("tokenizer.json", {"decoder": {"type": "Fuse"}}),
    ],
)
def test_other_files_are_left_to_transformers(demo: Path, tmp_path: Path, name: str, values: dict[str, Any]) -> None:
    folder = changed(demo, tmp_path / "own", name, values)
    assert PictureSettings.read(folder) is None or read_tokenizer(folder) is None


def test_what_transformers_has_saved_serves_the_same(
    demo: Path, light: RequestProcessor, whole: EchoVLMProcessor, tmp_path: Path
) -> None:
    whole.save_pretrained(tmp_path)
    again = load_request_processor(tmp_path)
    assert type(again) is RequestProcessor
    assert again.settings == light.settings
    text = "Liver, <|im_end|> 12 mm"
    assert again.encode_text(text) == light.encode_text(text)


def test_the_same_errors_as_with_transformers(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        load_request_processor(tmp_path)
    bare = changed(demo, tmp_path / "bare", "tokenizer_config.json", {})
    for path in (*bare.glob("*token*"), *bare.glob("vocab*"), *bare.glob("merges*")):
        path.unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        load_request_processor(bare)
    other = changed(demo, tmp_path / "other", "config.json", {"image_token_id": 3})
    with pytest.raises(ValueError, match="they belong to different checkpoints"):
        load_request_processor(other)
