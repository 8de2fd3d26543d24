"""What a checkpoint's preprocessor_config.json says of pictures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

SETTINGS_NAME = "preprocessor_config.json"
# transformers' newer file for all processors of a checkpoint; where it is there, it counts instead.
_COMBINED_NAME = "processor_config.json"
DEFAULT_MIN_PIXELS, DEFAULT_MAX_PIXELS = 56 * 56, 28 * 28 * 1280
_CHANNELS = 3
_BOUNDS = frozenset({"shortest_edge", "longest_edge"})
# Older names, in `size` or beside it; beside it they overrule.
_PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
# Of Qwen2-VL, for what the file leaves out.
_DEFAULTS: Mapping[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    # Pillow's number of bicubic.
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": DEFAULT_MIN_PIXELS, "longest_edge": DEFAULT_MAX_PIXELS},
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}


@dataclass(frozen=True, slots=True)
class PictureSettings:
    """The fields that count, not yet checked: `PictureSize` says what is wrong with them."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    resample: int
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    size: Mapping[str, Any]
    do_resize: bool
    do_rescale: bool
    do_normalize: bool

    @classmethod
    def of(cls, image_processor: Any) -> Self:
        """Those of transformers' `Qwen2VLImageProcessorPil`.

        Raises:
            ValueError: mean and deviation are not one number for each channel.
        """
        values: dict[str, Any] = {name: getattr(image_processor, name, None) for name in _DEFAULTS}
        for name in ("image_mean", "image_std"):
            values[name] = _by_channel(name, values[name])
        return cls(**{**values, "size": dict(image_processor.size)})

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Those of a checkpoint's folder, where the file says them as Qwen2-VL's does; otherwise None.

        None is no verdict: transformers knows more ways to say them.
        """
        if (directory / _COMBINED_NAME).exists():
            return None
        try:
            values = json.loads((directory / SETTINGS_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(values, dict) or any(values.get(name, 0) is None for name in (*_DEFAULTS, *_PIXELS)):
            return None
        found = {**_DEFAULTS, **{name: values[name] for name in _DEFAULTS if name in values}}
        if not isinstance(found["size"], dict):
            return None
        size = {name: value for name, value in found["size"].items() if name not in values}
        size |= {edge: values[name] for name, edge in _PIXELS.items() if name in values}
        if not size.keys() <= _BOUNDS and size.keys() != _PIXELS.keys():
            return None
        try:
            for name in ("image_mean", "image_std"):
                found[name] = _by_channel(name, found[name])
        except ValueError:
            return None
        return cls(**{**found, "size": size})


def _by_channel(name: str, value: Any) -> tuple[float, ...]:
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * _CHANNELS
    if len(numbers) != _CHANNELS or not all(type(number) in (int, float) for number in numbers):
        raise ValueError(
            f"{SETTINGS_NAME} has {name} {value!r}; it must be a number for each of the {_CHANNELS} channels"
        )
    return numbers
