import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.model.picture_size import PictureSize
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.vision.scaling import Scaling

TOKEN = 28 * 28


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "demo"
    make_demo(directory)
    return directory


def configured(demo: Path, directory: Path, **values: Any) -> EchoVLMProcessor:
    """The demo's processor with other numbers in its preprocessor_config.json; None takes one out."""
    EchoVLMProcessor.from_pretrained(demo).save_pretrained(directory)
    path = directory / "preprocessor_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return EchoVLMProcessor.from_pretrained(directory)


@pytest.mark.parametrize("least", [256, 200, 196, 195, 100, 64])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (600, 800), (100, 100), (28, 28), (1080, 1920), (60, 700)])
def test_a_large_minimum_of_the_checkpoint_refuses_no_ordinary_picture(
    demo: Path, tmp_path: Path, least: int, height: int, width: int
) -> None:
    processor = configured(demo, tmp_path, size={"shortest_edge": least * TOKEN, "longest_edge": 1280 * TOKEN})
    pixels = np.zeros((height, width, 3), np.uint8)
    found = processor.image_patches(pixels, max_visual_tokens=196)
    # As many tokens as the minimum asks for, or as the limit leaves; whole rows are all that is lost.
    assert 0.8 * min(least, 196) <= found.num_tokens <= 196
    video = processor.video_patches([pixels] * 4, max_visual_tokens=196)
    assert video.num_tokens == 2 * found.num_tokens


def test_without_a_limit_the_minimum_is_kept(demo: Path, tmp_path: Path) -> None:
    processor = configured(demo, tmp_path, size={"shortest_edge": 256 * TOKEN, "longest_edge": 1280 * TOKEN})
    assert processor.image_patches(np.zeros((100, 100, 3), np.uint8)).num_tokens >= 256


def test_a_long_and_narrow_picture_is_still_refused(demo: Path, tmp_path: Path) -> None:
    processor = configured(demo, tmp_path, size={"shortest_edge": 256 * TOKEN, "longest_edge": 1280 * TOKEN})
    with pytest.raises(ValueError, match="long and narrow"):
        processor.image_patches(np.zeros((10, 300, 3), np.uint8), max_visual_tokens=16)
    with pytest.raises(ValueError, match="over 200 times"):
        processor.image_patches(np.zeros((1, 201, 3), np.uint8), max_visual_tokens=196)


@given(
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    least=st.integers(1, 400),
    limit=st.integers(16, 400),
)
@example(height=1000, width=1000, least=196, limit=196)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_what_is_longer_than_a_row_of_all_tokens_passes_the_limit(
    height: int, width: int, least: int, limit: int
) -> None:
    if max(height, width) > min(limit, 200) * min(height, width):
        return
    scaling = Scaling(28, least * TOKEN, limit * TOKEN, limit, Image.Resampling.BICUBIC)
    rows, columns = scaling.size(height, width)
    assert rows * columns <= limit * TOKEN


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ({}, 3136, 1003520),
        ({"min_pixels": 6272, "max_pixels": 12845056}, 6272, 12845056),
        ({"size": {"min_pixels": 6272, "max_pixels": 200704}}, 6272, 200704),
        ({"min_pixels": 3136, "max_pixels": 10**6, "size": {"min_pixels": 1, "max_pixels": 2}}, 3136, 10**6),
        ({"size": {"shortest_edge": 6272}}, 6272, 1003520),
        ({"size": {"longest_edge": 200704}}, 3136, 200704),
        ({"size": None}, 3136, 1003520),
    ],
)
def test_every_spelling_of_the_bounds(values: dict[str, Any], low: int, high: int) -> None:
    found = PictureSize.of(Qwen2VLImageProcessorPil(**values))
    assert (found.min_pixels, found.max_pixels, found.side) == (low, high, 28)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"min_pixels": 10**6, "max_pixels": 10**5}, "min_pixels .* above max_pixels"),
        ({"max_pixels": 783, "min_pixels": 1}, "one visual token takes 784"),
        ({"min_pixels": 0.5}, "min_pixels 0.5"),
        ({"min_pixels": -1}, "min_pixels -1"),
        ({"size": {"shortest_edge": "3136", "longest_edge": 10**6}}, "min_pixels '3136'"),
        ({"size": {"height": 224, "width": 224}}, "fixed height and width"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"patch_size": None}, "patch_size None"),
        ({"merge_size": -2}, "merge_size -2"),
        ({"temporal_patch_size": 1.5}, "temporal_patch_size 1.5"),
        ({"do_resize": False}, "do_resize false"),
    ],
)
def test_odd_numbers_are_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PictureSize.of(Qwen2VLImageProcessorPil(**values))


def test_numbers_of_another_checkpoint_are_found_at_start(demo: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    configured(demo, own)
    config = next(path for path in (demo / "config.json", demo / "backbone" / "config.json") if path.exists())
    (own / "config.json").write_text(config.read_text())
    EchoVLMProcessor.from_pretrained(own)
    path = own / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 16}))
    with pytest.raises(ValueError, match=r"vision_config.patch_size 14, but .* has patch_size 16"):
        EchoVLMProcessor.from_pretrained(own)
