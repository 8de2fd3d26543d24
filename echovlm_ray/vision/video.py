"""Videos in memory to RGB frames, sampled as those of a cine loop.

Of a video whose packets have times, only what the sampled frames depend on is decoded: from the key frame before each.
Otherwise all of it is, in order. Colours, ranges and chroma are converted by FFmpeg's swscale as the stream says.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from echovlm_ray.vision.picture import FrameArray, InvalidPictureError, Picture, check_pixels
from echovlm_ray.vision.sampling import sample_frames
from echovlm_ray.vision.video_stream import CONVERT, OpenVideo, open_video

if TYPE_CHECKING:
    from av import Packet, VideoFrame

# Pixels that are decoded to get at the frames looked at, in multiples of the limit of pixels.
MAX_DECODED = 16
# Pixels may be up to this many times wider than high, or higher than wide; more is a mistake.
_MAX_PIXEL_RATIO = 4
_DAMAGED = "Some of its frames are damaged and were left out."


def decode_video(content: bytes, kind: str, *, max_pixels: int, max_frames: int, square_pixels: bool = True) -> Picture:
    """Frames of a video, evenly spread, the first and the last among them; sound is left out.

    Args:
        content: the whole file or stream.
        kind: one of `kinds.VIDEOS`.
        max_pixels: of the frames taken together; `MAX_DECODED` times as many are decoded to get at them.
        max_frames: at least 2.
        square_pixels: whether frames of pixels that are not square are stretched until they are.

    Raises:
        InvalidPictureError: no frame can be decoded, or over the limits.
    """
    with open_video(content, kind, max_pixels) as video:
        return _Frames(video, max_pixels, max_frames, square_pixels).picture()


class _Frames:
    """Picks frames out of one open video."""

    def __init__(self, video: OpenVideo, max_pixels: int, max_frames: int, square_pixels: bool) -> None:
        self._video = video
        self._context = video.stream.codec_context
        self._max_pixels = max_pixels
        self._max_frames = max_frames
        self._square_pixels = square_pixels
        self._size: tuple[int, int] | None = None
        self._stored: tuple[int, int] | None = None
        self._looked_at = max_frames
        self._notices = list(video.notices)
        self._packets = self._from_first_key_frame(video.packets)

    def picture(self) -> Picture:
        frames = sum(not packet.is_discard for packet in self._packets)
        if not frames:
            raise self._empty()
        width, height = self._context.width, self._context.height
        self._looked_at = len(set(sample_frames(frames, self._max_frames)))
        if width and height:
            check_pixels(width, height, self._looked_at, self._max_pixels)
        picture = self._by_time(frames) or self._in_order(frames)
        stated = self._video.stated_frames
        if stated > picture.source_frames:
            self._note(f"It says that it has {stated} frames, and {picture.source_frames} are there.")
        is_partial = self._video.is_cut_off or _DAMAGED in self._notices
        return Picture(picture.frames, picture.indices, picture.source_frames, tuple(self._notices), is_partial)

    def _by_time(self, frames: int) -> Picture | None:
        """The sampled frames found by their times; None if the packets do not tell enough."""
        packets = self._packets
        if not self._video.has_times:
            if not all(packet.is_keyframe for packet in packets):
                return None
            # Every frame is independent, so the decoding order is the display order.
            for place, packet in enumerate(packets):
                packet.pts = packet.dts = place
        times = [packet.pts for packet in packets if not packet.is_discard and packet.pts is not None]
        if len(set(times)) < frames:
            return None
        shown = sorted(times)
        indices = sample_frames(frames, self._max_frames)
        runs = self._runs([shown[index] for index in sorted(set(indices))])
        if runs is None:
            return None
        if not self._affordable(sum(stop - start for start, stop, _ in runs)):
            nearest = self._nearest_key_frames([shown[index] for index in indices])
            runs = self._runs(sorted(set(nearest)))
            if len(set(nearest)) < 2 or runs is None:
                return None
            self._note(
                "It is long, so the frames looked at are those nearest to an even spread that can be decoded alone."
            )
            indices = tuple(shown.index(time) for time in nearest)
        taken: dict[int | None, FrameArray] = {}
        for start, stop, wanted in runs:
            for frame in self._decoded(packets[start:stop]):
                if frame.pts == packets[start].pts and not frame.key_frame:
                    # The container is wrong about where decoding can start.
                    return None
                if frame.pts in wanted and frame.pts not in taken and not frame.is_corrupt:
                    taken[frame.pts] = self._rgb(frame)
            if not wanted <= taken.keys():
                return None
        return Picture(tuple(taken[shown[index]] for index in indices), indices, frames)

    def _runs(self, wanted: list[int]) -> list[tuple[int, int, set[int]]] | None:
        """Ranges of packets to decode in one go, and the times of the frames wanted of each.

        A frame is found by decoding from the last key frame that is neither shown nor decoded after it, until the
        decoder has given back all that it holds.
        """
        places = {packet.pts: place for place, packet in enumerate(self._packets)}
        keys = [(place, packet.pts) for place, packet in enumerate(self._packets) if packet.is_keyframe]
        runs: list[tuple[int, int, set[int]]] = []
        for time in wanted:
            starts = [place for place, pts in keys if place <= places[time] and pts is not None and pts <= time]
            if not starts:
                return None
            stop = places[time] + 1
            if runs and starts[-1] < runs[-1][1]:
                start, last, times = runs.pop()
                runs.append((start, max(last, stop), times | {time}))
            else:
                runs.append((starts[-1], stop, {time}))
        return runs

    def _nearest_key_frames(self, wanted: list[int]) -> list[int]:
        packets = (packet for packet in self._packets if packet.is_keyframe and not packet.is_discard)
        keys = [packet.pts for packet in packets if packet.pts is not None]
        return [min(keys, key=lambda key: abs(key - time)) for time in wanted]

    def _in_order(self, frames: int) -> Picture:
        """The sampled frames found by decoding everything and counting."""
        if not self._affordable(len(self._packets)):
            raise InvalidPictureError(
                f"is a video of {len(self._packets)} frames of {self._context.width} × {self._context.height} pixels, "
                f"of which more than {MAX_DECODED} × {self._max_pixels} pixels (gateway.max_image_pixels) would have "
                "to be decoded: send a shorter part of it, or one of smaller frames"
            )
        taken: dict[int, FrameArray] = {}
        for _ in range(2):
            indices = sample_frames(frames, self._max_frames)
            taken, count = {}, 0
            for frame in self._decoded(self._packets):
                if frame.is_corrupt:
                    self._note(_DAMAGED)
                    continue
                if count in indices:
                    taken[count] = self._rgb(frame)
                count += 1
            if not count:
                raise self._empty()
            if count == frames or taken.keys() >= set(sample_frames(count, self._max_frames)):
                break
            # More or fewer than the container has packets: once more, now that the number is known.
            frames = count
        indices = sample_frames(count, self._max_frames)
        return Picture(tuple(taken[index] for index in indices), indices, count)

    def _decoded(self, packets: list["Packet[Any]"]) -> Iterator["VideoFrame"]:
        import av

        self._context.flush_buffers()
        for packet in (*packets, None):
            try:
                yield from self._context.decode(packet)
            except (av.FFmpegError, ValueError):
                self._note(_DAMAGED)

    def _rgb(self, frame: "VideoFrame") -> FrameArray:
        if self._size is None:
            self._size = self._shown_size(frame)
        width, height = self._size
        if (frame.width, frame.height) != self._stored:
            self._note("The size of its frames changes; all are shown in the size of the first.")
        if frame.interlaced_frame:
            self._note("It is interlaced; both fields of a frame are shown together.")
        rgb = frame.to_ndarray(format="rgb24", width=width, height=height, threads=1)
        quarters = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(rgb, quarters), dtype=np.uint8)

    def _shown_size(self, frame: "VideoFrame") -> tuple[int, int]:
        """The size of all the frames taken: that of the first, with square pixels."""
        self._stored = frame.width, frame.height
        width, height = self._stored
        ratio = self._video.stream.sample_aspect_ratio
        if ratio and ratio != 1 and self._square_pixels:
            if 1 / _MAX_PIXEL_RATIO <= ratio <= _MAX_PIXEL_RATIO:
                width, height = (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))
            else:
                self._note("Its pixels are said to be far from square, which was not believed.")
        check_pixels(width, height, self._looked_at, self._max_pixels)
        return width, height

    def _from_first_key_frame(self, packets: list["Packet[Any]"]) -> list["Packet[Any]"]:
        first = next((place for place, packet in enumerate(packets) if packet.is_keyframe), 0)
        if first:
            self._note("It begins in the middle; frames before its first key frame are left out.")
        return packets[first:]

    def _affordable(self, frames: int) -> bool:
        pixels = max(1, self._context.width * self._context.height)
        return frames * pixels <= MAX_DECODED * self._max_pixels

    def _note(self, notice: str) -> None:
        if notice not in self._notices:
            self._notices.append(notice)

    def _empty(self) -> InvalidPictureError:
        return InvalidPictureError(f"is a video of which no frame can be decoded; export it again, or {CONVERT}")
