"""Text, images and videos of a request to what the model takes, without transformers and torch.

`EchoVLMProcessor` is the same with what training and transformers' own `generate` need beside.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from echovlm_ray.model.picture_patches import PicturePatches, VisionPatches
from echovlm_ray.model.picture_settings import PictureSettings
from echovlm_ray.model.text_tokens import (
    IMAGE_TOKEN,
    TURN_END,
    TURN_START,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    TextTokens,
)
from echovlm_ray.prompts import Message

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


class RequestProcessor(PicturePatches):
    """Tokens and patches of one checkpoint."""

    def __init__(self, settings: PictureSettings, tokenizer: Tokenizer, special: Collection[str]) -> None:
        """
        Args:
            settings: of pictures.
            tokenizer: see `TextTokens`.
            special: likewise.

        Raises:
            ValueError: the tokenizer lacks a control token, or has it as ordinary text; or the settings have sizes
                that are missing or contradict each other.
        """
        super().__init__(settings)
        self._text = TextTokens(tokenizer, special)

    def check_config(self, path: Path) -> None:
        """Checks that a config.json, if there is one, belongs to the same checkpoint.

        Raises:
            ValueError: it names other control tokens or sizes of patches.
        """
        if not path.exists():
            return
        config = json.loads(path.read_text(encoding="utf-8"))
        for token, field in _CONFIG_FIELDS.items():
            if config.get(field, self._text.control_ids[token]) != self._text.control_ids[token]:
                raise ValueError(
                    f"{path} has {field} {config[field]}, but the tokenizer beside it has {token} as "
                    f"{self._text.control_ids[token]}: they belong to different checkpoints"
                )
        vision = config.get("vision_config") or {}
        for name, (field, default) in _VISION_FIELDS.items():
            own = getattr(self.settings, name)
            if vision.get(field, default) != own:
                raise ValueError(
                    f"{path} has vision_config.{field} {vision.get(field, default)}, but preprocessor_config.json "
                    f"beside it has {name} {own}: they belong to different checkpoints"
                )

    def encode_chat(self, messages: Sequence[Message], vision: Sequence[VisionPatches]) -> list[int]:
        """Token ids of a chat up to where the assistant answers, in ChatML as Qwen2-VL has it.

        No text of a message can become a control token, whatever it says. The checkpoint's chat template is not run.

        Args:
            messages: the chat; its images and videos in the order of `vision`.
            vision: gives each placeholder its length.

        Raises:
            ValueError: the messages show other images and videos than `vision` holds.
        """
        shown = [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]
        given = ["video" if item.is_video else "image" for item in vision]
        if shown != given:
            raise ValueError(f"the messages show {shown or 'nothing'}, but {given or 'nothing'} was given")
        control = self._text.control_ids
        rest = iter(vision)
        ids: list[int] = []
        for message in messages:
            ids += [control[TURN_START], *self.encode_text(message["role"] + "\n")]
            for part in message["content"]:
                if part["type"] == "text":
                    ids += self.encode_text(part["text"])
                else:
                    item = next(rest)
                    placeholder = control[VIDEO_TOKEN if item.is_video else IMAGE_TOKEN]
                    ids += [
                        control[VISION_START],
                        *[placeholder] * item.num_tokens,
                        control[VISION_END],
                    ]
            ids += [control[TURN_END], *self.encode_text("\n")]
        return [*ids, control[TURN_START], *self.encode_text("assistant\n")]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text; see `TextTokens.encode`."""
        return self._text.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; see `TextTokens.decode`."""
        return self._text.decode(token_ids)
