"""A video's packets in memory, by FFmpeg through PyAV: opened without reach to anything outside the bytes.

The container format is given by name, so playlists, image sequences and subtitles are never tried; whatever a container
asks to be opened beside itself is refused; and only codecs of the list are opened.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from echovlm_ray.vision.kinds import VIDEOS
from echovlm_ray.vision.picture import InvalidPictureError
from echovlm_ray.vision.stated_size import is_cut_short

if TYPE_CHECKING:
    from av import Packet
    from av.video.stream import VideoStream

# What ultrasound machines, archives and phones write, and what their older software wrote.
_CODECS = frozenset(
    (
        "h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "mjpeg",
        "mjpegb", "jpegls", "jpeg2000", "png", "rawvideo", "vp8", "vp9", "libvpx-vp9", "av1", "libdav1d",
        "wmv1", "wmv2", "wmv3", "vc1", "h263", "dvvideo", "cinepak", "msvideo1", "msrle", "indeo3", "indeo4",
        "indeo5", "huffyuv", "ffvhuff", "ffv1", "utvideo", "qtrle", "rpza", "svq1", "svq3", "prores", "dnxhd",
        "tscc", "tscc2", "cscd", "zmbv", "mszh", "zlib", "v210", "v410", "r210", "yuv4",
    )
)  # fmt: skip
CONVERT = "convert it to MP4 with H.264"
# An hour at 25 frames a second.
_MAX_PACKETS = 100_000
# FFmpeg looks at this much to find out what is in a container.
_PROBED_BYTES = 5_000_000
# Containers without presentation times: if frames refer to later ones, FFmpeg guesses the times wrong.
_WITHOUT_TIMES = frozenset(("AVI", "MPEG video", "MPEG-4 video", "H.264", "HEVC"))
# A video that lasts less than this share of its stated time, by more than some seconds, is cut off.
_SHORT, _SHORT_S = 0.9, 0.2
# A coded frame may be larger than what is shown of it.
_CODED_SLACK = 2


@dataclass(slots=True, eq=False)
class OpenVideo:
    """The one video stream that is looked at.

    Attributes:
        stream: PyAV's, with its decoder not yet opened.
        packets: all of the stream that are to be shown, in the order in which they are decoded.
        has_times: whether the times of the packets are those of the container.
        stated_frames: the container's number of frames; 0 if it has none.
        notices: what is amiss with the container.
        is_cut_off: whether packets that the container declares, or parts of them, are missing.
    """

    stream: "VideoStream"
    packets: list["Packet[Any]"]
    has_times: bool
    stated_frames: int
    notices: tuple[str, ...]
    is_cut_off: bool


@contextmanager
def open_video(content: bytes, kind: str, max_pixels: int) -> Iterator[OpenVideo]:
    """Opens a video and reads its packets; decodes only what FFmpeg needs in order to know the format.

    Args:
        content: the whole file or stream.
        kind: one of `kinds.VIDEOS`.
        max_pixels: of a frame.

    Raises:
        InvalidPictureError: no video in it, encrypted, a codec that is not known here, or more than the limits.
    """
    try:
        import av
    except ImportError:
        raise InvalidPictureError(
            "is a video, and this server was installed without a decoder for videos; its operator adds that with "
            "pip install 'echovlm-ray[video]'"
        ) from None
    options = {
        "codec_whitelist": ",".join(sorted(_CODECS)),
        "max_pixels": str(_CODED_SLACK * max_pixels),
        "probesize": str(_PROBED_BYTES),
        "threads": "1",
    }
    container = None
    # Read in one direction only, MP4 in fragments can be opened even if the last one is cut off.
    for source in (io.BytesIO(content), _Forward(content)):
        try:
            container = av.open(
                source,
                mode="r",
                format=VIDEOS[kind],
                options=options,
                container_options={"enable_drefs": "0", "use_absolute_path": "0"} if kind == "MP4" else {},
                metadata_errors="replace",
                io_open=_refuse_to_open,
            )
            break
        except (av.FFmpegError, ValueError, RuntimeError, OSError):
            continue
    if container is None:
        raise InvalidPictureError(f"is a video ({kind}) that is damaged or truncated; export it again, or {CONVERT}")
    with container:
        stream, notices = _video_stream(container)
        packets, whole = _packets(container, stream, len(content))
        is_cut_off = not whole or is_cut_short(content, kind) or _is_short(container, stream, packets)
        if is_cut_off:
            notices = (*notices, "The file is cut off or damaged; the frames that are there are taken.")
        is_cut_off = is_cut_off or len(packets) < stream.frames
        yield OpenVideo(stream, packets, kind not in _WITHOUT_TIMES, stream.frames, notices, is_cut_off)


class _Forward:
    """A file in memory that cannot be read again."""

    def __init__(self, content: bytes) -> None:
        self.read = io.BytesIO(content).read


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise PermissionError("a video may not open other files")


def _video_stream(container: Any) -> tuple["VideoStream", tuple[str, ...]]:
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise InvalidPictureError("has no video in it; send a video or an image")
    stream = streams[0]
    if stream.codec_context is None or stream.codec_context.name not in _CODECS:
        raise InvalidPictureError(f"is a video with a codec that is not accepted, or encrypted; {CONVERT}")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": container.options["max_pixels"]}
    return stream, ("It has several video tracks; the first is shown.",) if len(streams) > 1 else ()


def _packets(container: Any, stream: "VideoStream", file_bytes: int) -> tuple[list["Packet[Any]"], bool]:
    """The stream's packets, and whether the container could be read to its end."""
    import av

    packets: list[Packet[Any]] = []
    total = 0
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.has_sidedata("encryption_info"):
                raise InvalidPictureError(f"is an encrypted video; decrypt it, or {CONVERT}")
            total += packet.size
            # A container's index can name the same bytes again and again.
            if len(packets) == _MAX_PACKETS or total > 2 * file_bytes:
                raise InvalidPictureError(
                    f"is a video of more than {_MAX_PACKETS} frames, or of more bytes than its file; send a part of it"
                )
            packets.append(packet)
    except (av.FFmpegError, OSError, RuntimeError):
        return packets, False
    whole = not any(packet.is_corrupt for packet in packets)
    if len(packets) > 1 and packets[-1].is_corrupt:
        # The file ends within it, and some decoders make half a frame of that without a word.
        packets.pop()
    return packets, whole


def _is_short(container: Any, stream: "VideoStream", packets: list["Packet[Any]"]) -> bool:
    """Whether the container declares a much longer duration than its packets have; False without times."""
    times = [packet.pts for packet in packets if packet.pts is not None]
    if stream.frames or container.streams.audio or not container.duration or not times or not stream.time_base:
        return False
    lasts = float((max(times) - min(times)) * stream.time_base)
    return lasts < _SHORT * float(container.duration) / 1_000_000 - _SHORT_S
