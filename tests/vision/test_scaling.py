"""Scaling without transformers gives the bits of transformers' own image processor."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from echovlm_ray.vision.scaling import Scaling


@given(
    height=st.integers(1, 900),
    width=st.integers(1, 900),
    min_pixels=st.sampled_from([3136, 50_176]),
    max_pixels=st.sampled_from([50_176, 153_664, 1_003_520]),
)
@settings(max_examples=300, deadline=None)
@example(height=4, width=800, min_pixels=3136, max_pixels=50_176)
def test_sizes_are_those_of_transformers(height: int, width: int, min_pixels: int, max_pixels: int) -> None:
    scaling = Scaling(28, min_pixels, max_pixels, None, 3)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match=f"{width} × {height} pixels"):
            scaling.size(height, width)
    else:
        assert scaling.size(height, width) == smart_resize(height, width, 28, min_pixels, max_pixels)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1000, 30), (20, 31), (224, 224), (2000, 1500)])
def test_pixels_are_those_of_transformers(height: int, width: int) -> None:
    frame = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 153_664})
    options: dict[str, Any] = {"input_data_format": "channels_last", "return_tensors": "np"}
    wanted = processor(images=frame, **options)
    scaled = Scaling(28, 3136, 153_664, None, int(processor.resample)).apply(frame)
    found = processor(images=scaled, do_resize=False, **options)
    assert np.array_equal(found["pixel_values"], wanted["pixel_values"])


def test_too_long_and_narrow_for_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 40 visual tokens, over 16; crop it"):
        Scaling(28, 3136, 16 * 784, 16, 3).size(28, 28 * 100)


@pytest.mark.parametrize(("height", "width"), [(100, 150), (30, 31), (480, 640), (60, 900)])
def test_a_limit_below_the_minimum_wins(height: int, width: int) -> None:
    scaling = Scaling(28, 256 * 784, 16 * 784, 16, 3)
    assert math.prod(scaling.size(height, width)) <= 16 * 784
