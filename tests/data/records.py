"""Small datasets of our own, with real image files."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.data import get_testdata_file


def record(identity: str, **more: Any) -> dict[str, Any]:
    """A valid record in the published form, of one image."""
    raw: dict[str, Any] = {
        "id": identity,
        "image": ["a.png"],
        "conversations": [
            {"from": "system", "value": "You describe ultrasound."},
            {"from": "human", "value": "<image>What is seen?"},
            {"from": "gpt", "value": "A simple cyst."},
        ],
    }
    return raw | more


def turns(*texts: str) -> list[dict[str, str]]:
    """Questions and answers in alternation."""
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def png(shade: int = 100, size: tuple[int, int] = (48, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), shade, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def cine() -> bytes:
    """A real echocardiogram of 30 frames."""
    return Path(str(get_testdata_file("examples_ybr_color.dcm"))).read_bytes()


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(raw, ensure_ascii=False) + "\n" for raw in records), encoding="utf-8")
    return path
