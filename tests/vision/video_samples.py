"""Videos of numbered frames, made for the tests."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.vision.images import DecodedImage, ImageLimits, decode_image_file

CASES = Path(__file__).parents[1] / "cases"


LIMITS = ImageLimits(max_image_bytes=16 * 1024**2, max_image_pixels=1_000_000, max_frames=8)


WIDTH, HEIGHT, FRAMES = 192, 128, 40


def decode(content: bytes, limits: ImageLimits = LIMITS) -> DecodedImage:
    return decode_image_file(content, limits=limits, field="images[0].content")


def refused(content: bytes, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        decode(content, limits)
    return caught.value.description


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> npt.NDArray[np.uint8]:
    """A frame that shows its number as eight bright or dark bars, above something that moves."""
    frame = np.full((height, width, 3), 40, np.uint8)
    for bit in range(8):
        frame[16:48, 8 + bit * 22 : 26 + bit * 22] = 230 if number >> bit & 1 else 20
    frame[64:120, number * 3 : number * 3 + 40] = (200, 60, 60)
    return frame


def number_of(frame: npt.NDArray[np.uint8]) -> int:
    return sum(int(frame[32, 17 + bit * 22].mean() > 128) << bit for bit in range(8))


def numbers(image: DecodedImage) -> list[int]:
    return [number_of(frame) for frame in image.frames]


def made(
    container: str,
    codec: str,
    pixels: str = "yuv420p",
    frames: int = FRAMES,
    times: Sequence[int] | None = None,
    ratio: Fraction | None = None,
    container_options: dict[str, str] | None = None,
    **options: object,
) -> bytes:
    """A video of numbered frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        stream.codec_context.thread_count = 1
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        stream.codec_context.options = {key: str(value) for key, value in options.items()}
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(number), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


H264_OPTIONS: dict[str, Any] = {"g": 12, "preset": "ultrafast", "bf": 3}


X265: dict[str, Any] = {"x265-params": "log-level=none:keyint=12:pools=none", "preset": "ultrafast"}


KINDS: dict[str, tuple[str, tuple[str, str], dict[str, Any]]] = {
    "mp4": ("MP4", ("mp4", "libx264"), H264_OPTIONS),
    "mp4, one key frame": ("MP4", ("mp4", "libx264"), {"bf": 2}),
    "mp4, open groups": ("MP4", ("mp4", "libx264"), {"bf": 5, "g": 12, "x264-params": "open-gop=1:b-pyramid=normal"}),
    "mp4 in fragments": (
        "MP4",
        ("mp4", "libx264"),
        {**H264_OPTIONS, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "mov": ("MP4", ("mov", "libx264"), H264_OPTIONS),
    "mp4 of HEVC": ("MP4", ("mp4", "libx265"), X265),
    "mp4 of MPEG-4": ("MP4", ("mp4", "mpeg4"), {"bf": 2}),
    "matroska": ("Matroska", ("matroska", "libx264"), H264_OPTIONS),
    "webm": ("Matroska", ("webm", "libvpx-vp9"), {"deadline": "realtime", "cpu-used": 8}),
    "avi of MJPEG": ("AVI", ("avi", "mjpeg"), {"pixels": "yuvj420p"}),
    "avi of MPEG-4": ("AVI", ("avi", "mpeg4"), {"bf": 2}),
    "avi of H.264": ("AVI", ("avi", "libx264"), H264_OPTIONS),
    "avi without compression": ("AVI", ("avi", "rawvideo"), {"pixels": "bgr24"}),
    "avi of Microsoft Video 1": ("AVI", ("avi", "msvideo1"), {"pixels": "rgb555le"}),
    "wmv": ("WMV", ("asf", "wmv2"), {}),
    "program stream": ("MPEG program stream", ("vob", "mpeg2video"), {"bf": 2}),
    "transport stream": ("MPEG transport stream", ("mpegts", "libx264"), H264_OPTIONS),
    "MPEG-2": ("MPEG video", ("mpeg2video", "mpeg2video"), {"bf": 2}),
    "H.264": ("H.264", ("h264", "libx264"), H264_OPTIONS),
    "HEVC": ("HEVC", ("hevc", "libx265"), X265),
}
