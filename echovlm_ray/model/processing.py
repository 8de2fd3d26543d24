"""Text, images and videos to what the model takes, with transformers' tokenizer and image processor beside.

Requests need less: see `echovlm_ray.model.request_processor`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from echovlm_ray.model.picture_patches import Picture, VisionPatches
from echovlm_ray.model.picture_settings import PictureSettings
from echovlm_ray.model.request_processor import RequestProcessor
from echovlm_ray.model.text_tokens import IMAGE_TOKEN, VIDEO_TOKEN
from echovlm_ray.prompts import Message


class EchoVLMProcessor(RequestProcessor):
    """Tokenizer and image processor of one checkpoint."""

    def __init__(self, image_processor: Qwen2VLImageProcessorPil, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the two parts.

        Raises:
            ValueError: the tokenizer is none of the tokenizers library, or lacks a control token, or has it as ordinary
                text; the image processor has sizes that are missing or contradict each other.
        """
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer has no tokenizer.json: use that of a Qwen2-VL checkpoint")
        special = set(tokenizer.all_special_tokens) | {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        super().__init__(PictureSettings.of(image_processor), tokenizer.backend_tokenizer, special)
        self.image_processor = image_processor
        self.tokenizer = tokenizer

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
        processor.check_config(directory / "config.json")
        return processor

    def save_pretrained(self, directory: str | Path) -> None:
        """Saves both parts for `from_pretrained`."""
        self.image_processor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

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
