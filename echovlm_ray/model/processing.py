"""Preprocesses text, images and videos for the model: Qwen2-VL's arithmetic with Pillow, without torchvision.

transformers' PIL image processor splits single images into patches; a video's patches are assembled from those of its
frames, which is the same arithmetic. The tokenizer is Qwen2's. A caller's text never becomes control tokens: these are
inserted by id.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from echovlm_ray.model.picture_size import PictureSize
from echovlm_ray.prompts import Message
from echovlm_ray.vision.scaling import Scaling

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, TURN_START, TURN_END)
# The field of config.json that must name the same token.
_CONFIG_FIELDS = {
    IMAGE_TOKEN: "image_token_id",
    VIDEO_TOKEN: "video_token_id",
    VISION_START: "vision_start_token_id",
    VISION_END: "vision_end_token_id",
}

# Fields of preprocessor_config.json that a field of vision_config must equal; a missing one has Qwen2-VL's default.
_VISION_FIELDS = {
    "patch_size": ("patch_size", 14),
    "merge_size": ("spatial_merge_size", 2),
    "temporal_patch_size": ("temporal_patch_size", 2),
}

Picture = Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class VisionPatches:
    """One image or video in the vision encoder's format.

    Attributes:
        is_video: whether it is a video.
        grid: patches in time, height and width, before merging.
        patches: float32, (grid_t · grid_h · grid_w) × (channels · temporal_patch_size · patch_size²).
        num_tokens: the number of its tokens in the prompt.
    """

    is_video: bool
    grid: tuple[int, int, int]
    patches: npt.NDArray[np.float32]
    num_tokens: int


class EchoVLMProcessor:
    """Tokenizer and image processor of one checkpoint."""

    def __init__(self, image_processor: Qwen2VLImageProcessorPil, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the two parts.

        Raises:
            ValueError: the tokenizer does not have a control token, or has it as ordinary text; or sizes of the image
                processor are missing or contradict each other.
        """
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self._size = PictureSize.of(image_processor)
        self._normalized = self._table()
        special = set(tokenizer.all_special_tokens) | {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        if missing := [token for token in CONTROL_TOKENS if token not in special]:
            raise ValueError(
                f"the tokenizer has no special token {', '.join(missing)}: use the tokenizer of a Qwen2-VL checkpoint"
            )
        vocabulary = tokenizer.get_vocab()
        self._ids = {token: vocabulary[token] for token in CONTROL_TOKENS}
        self._control_ids = frozenset(self._ids.values())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Loads both parts of a checkpoint folder, released or a split one's `backbone/`; runs no code from it.

        Raises:
            ValueError: the folder lacks the files, or its config.json names other control tokens than its tokenizer.
        """
        directory = Path(directory)
        if (directory / "backbone").is_dir() and not (directory / "preprocessor_config.json").exists():
            directory = directory / "backbone"
        if not (directory / "preprocessor_config.json").exists():
            raise ValueError(f"{directory} has no preprocessor_config.json: give the folder of a checkpoint")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory, local_files_only=True)
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except OSError as error:
            raise ValueError(f"{directory} has no tokenizer: copy that of a Qwen2-VL checkpoint there") from error
        processor = cls(image_processor, tokenizer)
        processor._check_config(directory / "config.json")
        return processor

    def save_pretrained(self, directory: str | Path) -> None:
        """Saves both parts for `from_pretrained`."""
        self.image_processor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def _check_config(self, path: Path) -> None:
        if not path.exists():
            return
        config = json.loads(path.read_text(encoding="utf-8"))
        for token, field in _CONFIG_FIELDS.items():
            if config.get(field, self._ids[token]) != self._ids[token]:
                raise ValueError(
                    f"{path} has {field} {config[field]}, but the tokenizer beside it has {token} as "
                    f"{self._ids[token]}: they belong to different checkpoints"
                )
        vision = config.get("vision_config") or {}
        for name, (field, default) in _VISION_FIELDS.items():
            own = getattr(self.image_processor, name)
            if vision.get(field, default) != own:
                raise ValueError(
                    f"{path} has vision_config.{field} {vision.get(field, default)}, but preprocessor_config.json "
                    f"beside it has {name} {own}: they belong to different checkpoints"
                )

    def scaling(self, max_visual_tokens: int | None = None) -> Scaling:
        """The scaling of frames; see `image_patches` for the limit."""
        side, max_pixels = self._size.side, self._size.max_pixels
        if max_visual_tokens is not None:
            max_pixels = min(max_pixels, max_visual_tokens * side * side)
        resample = int(self.image_processor.resample)
        return Scaling(side, self._size.min_pixels, max_pixels, max_visual_tokens, resample)

    def image_patches(self, image: Picture, *, max_visual_tokens: int | None = None) -> VisionPatches:
        """Splits a still image into patches.

        Args:
            image: RGB; an array is height × width × 3, uint8.
            max_visual_tokens: the image is scaled to fit, also below the checkpoint's minimum; None for the
                checkpoint's limits.

        Raises:
            ValueError: the image is too narrow to be scaled to fit.
        """
        return self.scaled_patches([self.scaling(max_visual_tokens).apply(_pixels(image))], is_video=False)

    def video_patches(self, frames: Sequence[Picture], *, max_visual_tokens: int | None = None) -> VisionPatches:
        """Splits a video into patches of `temporal_patch_size` (2) frames; the last frame is repeated if one is
        missing.

        Args:
            frames: RGB, all of one size.
            max_visual_tokens: the limit for each `temporal_patch_size` frames, which then take as much as one still
                image.

        Raises:
            ValueError: no frames, frames of different sizes, or frames too long and narrow.
        """
        scaling = self.scaling(max_visual_tokens)
        return self.scaled_patches([scaling.apply(_pixels(frame)) for frame in frames], is_video=True)

    def scaled_patches(self, frames: Sequence[npt.NDArray[np.uint8]], *, is_video: bool) -> VisionPatches:
        """Splits scaled frames (see `scaling`) into patches.

        Args:
            frames: height × width × 3, uint8, RGB, all of one size; a still image is one frame.
            is_video: see `video_patches`.

        Raises:
            ValueError: no frames, or frames of different sizes.
        """
        if not frames:
            raise ValueError("a video needs at least one frame")
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError("the frames of a video must be of one size")
        side, depth = self.image_processor.patch_size, self.image_processor.temporal_patch_size
        height, width = frames[0].shape[0] // side, frames[0].shape[1] // side
        num_tokens = height * width // self.image_processor.merge_size**2
        # A still image's patch repeats its frame `depth` times.
        padded = [*frames, *[frames[-1]] * (-len(frames) % depth)]
        groups = [self._group_patches(padded[start : start + depth]) for start in range(0, len(padded), depth)]
        grid = (len(groups), height, width)
        return VisionPatches(is_video, grid, np.concatenate(groups), len(groups) * num_tokens)

    def _group_patches(self, frames: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Patches of `temporal_patch_size` frames: (grid_h · grid_w) × (channels · frames · patch_size²)."""
        side, merge = self.image_processor.patch_size, self.image_processor.merge_size
        rows, columns = (length // (side * merge) for length in frames[0].shape[:2])
        patches = np.empty((rows * columns * merge**2, 3, len(frames), side**2), dtype=np.float32)
        for slot, frame in enumerate(frames):
            if slot and frame is frames[slot - 1]:
                patches[:, :, slot] = patches[:, :, slot - 1]
                continue
            tiles = frame.reshape(rows, merge, side, columns, merge, side, 3).transpose(0, 3, 1, 4, 6, 2, 5)
            values = tiles.reshape(-1, 3, side**2)
            for channel, table in enumerate(self._normalized):
                patches[:, channel, slot] = table[values[:, channel]]
        return patches.reshape(len(patches), -1)

    def _table(self) -> npt.NDArray[np.float32]:
        """The normalised value of each byte of each channel, channels × 256, as computed by the image processor."""
        side = self._size.side
        # An image with a tile of each shade.
        shades = np.repeat(np.arange(256, dtype=np.uint8), side)
        picture = np.broadcast_to(shades[None, :, None], (side, 256 * side, 3))
        features = self.image_processor(
            images=picture, do_resize=False, input_data_format="channels_last", return_tensors="np"
        )
        values: npt.NDArray[np.float32] = features["pixel_values"]
        return np.ascontiguousarray(values.reshape(256, self.image_processor.merge_size**2, 3, -1)[:, 0, :, 0].T)

    def encode_chat(self, messages: Sequence[Message], vision: Sequence[VisionPatches]) -> list[int]:
        """The token ids of a chat up to the assistant's answer, in Qwen2-VL's ChatML.

        No text of a message can become a control token. The checkpoint's chat template is not used.

        Args:
            messages: the chat; its images and videos in the order of `vision`.
            vision: the images and videos, which determine the lengths of the placeholders.

        Raises:
            ValueError: the images and videos of the messages do not match `vision`.
        """
        shown = [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]
        given = ["video" if item.is_video else "image" for item in vision]
        if shown != given:
            raise ValueError(f"the messages show {shown or 'nothing'}, but {given or 'nothing'} was given")
        rest = iter(vision)
        ids: list[int] = []
        for message in messages:
            ids += [self._ids[TURN_START], *self.encode_text(message["role"] + "\n")]
            for part in message["content"]:
                if part["type"] == "text":
                    ids += self.encode_text(part["text"])
                else:
                    item = next(rest)
                    placeholder = self._ids[VIDEO_TOKEN if item.is_video else IMAGE_TOKEN]
                    ids += [self._ids[VISION_START], *[placeholder] * item.num_tokens, self._ids[VISION_END]]
            ids += [self._ids[TURN_END], *self.encode_text("\n")]
        return [*ids, self._ids[TURN_START], *self.encode_text("assistant\n")]

    def encode_text(self, text: str) -> list[int]:
        """The token ids of plain text; names of special tokens in it are ordinary text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert not self._control_ids.intersection(ids), "plain text became a control token"
        return list(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens without special tokens; incomplete characters become U+FFFD."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Picture] = (),
        videos: Sequence[Sequence[Picture]] = (),
        *,
        padding: bool = False,
        padding_side: str | None = None,
        max_visual_tokens: int | None = None,
    ) -> BatchFeature:
        """Inputs of the model's `forward` and `generate`, as torch tensors.

        Args:
            text: one prompt or a batch, with one <|image_pad|> or <|video_pad|> for each image and video, as in chat
                templates. Control tokens in it are interpreted: for untrusted text use `encode_chat`.
            images: of all prompts, in order.
            videos: likewise, each a sequence of frames.
            padding: needed for a batch of prompts of different length.
            padding_side: "left" or "right"; None for the tokenizer's.
            max_visual_tokens: see `image_patches`.

        Raises:
            ValueError: the text has another number of images or videos than given; the error has both.
        """
        texts = [text] if isinstance(text, str) else list(text)
        vision = {
            IMAGE_TOKEN: [self.image_patches(image, max_visual_tokens=max_visual_tokens) for image in images],
            VIDEO_TOKEN: [self.video_patches(video, max_visual_tokens=max_visual_tokens) for video in videos],
        }
        for token, items in vision.items():
            texts = _expand(texts, token, items)
        encoded = self.tokenizer(
            texts, padding=padding, padding_side=padding_side, add_special_tokens=False, split_special_tokens=False
        )
        data: dict[str, Any] = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        for token, values, grid in (
            (IMAGE_TOKEN, "pixel_values", "image_grid_thw"),
            (VIDEO_TOKEN, "pixel_values_videos", "video_grid_thw"),
        ):
            if vision[token]:
                data[values] = np.concatenate([item.patches for item in vision[token]])
                data[grid] = np.array([item.grid for item in vision[token]], dtype=np.int64)
        return BatchFeature(data, tensor_type="pt")

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a chat by the checkpoint's template, for `__call__`."""
        # transformers declares content as text, but accepts parts as well.
        chat: Any = list(messages)
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)
        return text


def _pixels(frame: Picture) -> npt.NDArray[np.uint8]:
    return np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame)


def _expand(texts: Sequence[str], token: str, items: Sequence[VisionPatches]) -> list[str]:
    marked = sum(text.count(token) for text in texts)
    if marked != len(items):
        raise ValueError(f"the text has {marked} {token}, but {len(items)} were given: mark each place once")
    rest = iter(items)
    expanded = []
    for text in texts:
        head, *tails = text.split(token)
        expanded.append(head + "".join(token * next(rest).num_tokens + tail for tail in tails))
    return expanded
