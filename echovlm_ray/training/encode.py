"""Encodes an example as tokens: the prompt exactly as when serving, and targets for the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.picture_patches import Picture, VisionPatches
from echovlm_ray.model.positions import mrope_positions
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.model.text_tokens import TURN_END
from echovlm_ray.training.examples import Example, ExampleError, ExampleSource
from echovlm_ray.training.finding_heads import FindingTargets, finding_targets

# The target of ignored positions in torch's cross entropy.
IGNORED = -100


@dataclass(frozen=True, slots=True, eq=False)
class EncodedExample:
    """One example, ready to be put into a batch.

    Attributes:
        input_ids_T: int64, prompt and answers without the last token, which has no target.
        target_T: int64, the token that follows each place where that belongs to an answer; elsewhere `IGNORED`.
        weight_T: float32, the weight of each target; 0 without one.
        position_3T: int64, see `echovlm_ray.model.positions`.
        vision: the pictures' patches, in order.
        embeddings_VD: float32, the images' embeddings, in place of `vision`; None if they are not computed.
        findings: the contents of the images, if known.
    """

    input_ids_T: torch.Tensor
    target_T: torch.Tensor
    weight_T: torch.Tensor
    position_3T: torch.Tensor
    vision: tuple[VisionPatches, ...] = ()
    embeddings_VD: torch.Tensor | None = None
    findings: FindingTargets | None = None

    def __len__(self) -> int:
        """Tokens."""
        return len(self.input_ids_T)


class TooLongError(ExampleError):
    """An example has more tokens than allowed. It is never cut: a cut picture would be another picture."""


class ExampleEncoder:
    """Turns examples into tokens and targets with one checkpoint's processor."""

    def __init__(
        self,
        processor: EchoVLMProcessor,
        config: EchoVLMConfig,
        *,
        max_tokens: int,
        max_visual_tokens: int,
        emphasis_weight: float = 1.0,
    ) -> None:
        """
        Args:
            processor: the checkpoint's.
            config: the model's, for the positions.
            max_tokens: of an example; one with more is refused.
            max_visual_tokens: of an image, and of two frames of a video; larger ones are scaled down.
            emphasis_weight: how much the tokens of an example's `emphasis` count; others count 1.
        """
        self._processor = processor
        self._config = config
        self._max_tokens = max_tokens
        self._max_visual_tokens = max_visual_tokens
        self._emphasis_weight = emphasis_weight
        self._turn_end = processor.tokenizer.get_vocab()[TURN_END]

    def encode(self, example: Example) -> EncodedExample:
        """Tokens, targets and patches of one example.

        Raises:
            TooLongError: it has more tokens than allowed; names both numbers.
            ExampleError: a picture cannot be cut into patches, or there is no answer.
        """
        try:
            vision = tuple(self._patches(picture) for picture in example.pictures)
        except ValueError as error:
            raise ExampleError(str(error)) from None
        tokens, weights = self._tokens(example, vision)
        if len(tokens) - 1 > self._max_tokens:
            visual = sum(item.num_tokens for item in vision)
            raise TooLongError(
                f"takes {len(tokens) - 1} tokens, {visual} of them visual, and data.max_tokens is {self._max_tokens}: "
                "raise it, lower data.max_visual_tokens, or shorten the record"
            )
        if not any(weights):
            raise ExampleError("has no answer to learn")
        ids = torch.tensor(tokens)
        weight = torch.tensor(weights)[1:]
        positions, _ = mrope_positions(
            ids[:-1],
            [item.grid for item in vision if not item.is_video],
            [item.grid for item in vision if item.is_video],
            self._config,
        )
        target = torch.where(weight > 0, ids[1:], IGNORED)
        findings = None
        if example.attributes is not None and vision:
            merge = self._config.vision_config.spatial_merge_size
            grids = [(frames, rows // merge, columns // merge) for frames, rows, columns in (v.grid for v in vision)]
            findings = finding_targets(example.attributes, example.tissue, grids)
        return EncodedExample(ids[:-1], target, weight, positions, vision, findings=findings)

    def _patches(self, picture: Picture | Sequence[Picture]) -> VisionPatches:
        if isinstance(picture, Sequence):
            return self._processor.video_patches(picture, max_visual_tokens=self._max_visual_tokens)
        return self._processor.image_patches(picture, max_visual_tokens=self._max_visual_tokens)

    def _tokens(self, example: Example, vision: Sequence[VisionPatches]) -> tuple[list[int], list[float]]:
        """All tokens with their weights: 0 for a prompt's."""
        tokens: list[int] = []
        weights: list[float] = []
        asked: list[int] = []
        rest = list(vision)
        for number, message in enumerate(example.messages):
            if message["role"] != "assistant":
                asked.append(number)
                continue
            messages = [example.messages[each] for each in asked]
            shown = sum(part["type"] != "text" for each in messages for part in each["content"])
            prompt = self._processor.encode_chat(messages, rest[:shown])
            rest = rest[shown:]
            answer = "".join(part["text"] for part in message["content"] if part["type"] == "text")
            answer_ids, answer_weights = self._answer(answer, example.emphasis)
            # What ends a turn is learnt too, but not the line end that the next prompt begins with.
            tokens += [*prompt, *answer_ids, self._turn_end, *self._processor.encode_text("\n")]
            weights += [0.0] * len(prompt) + [*answer_weights, 1.0]
            weights += [0.0] * (len(tokens) - len(weights))
            asked = []
        if asked or rest:
            raise ExampleError("must end in a turn of the assistant, which every picture comes before")
        end = len(weights) - next((back for back, weight in enumerate(reversed(weights)) if weight), 0)
        return tokens[:end], weights[:end]

    def _answer(self, answer: str, emphasis: Sequence[str]) -> tuple[list[int], list[float]]:
        ids = self._processor.encode_text(answer)
        weights = [1.0] * len(ids)
        if self._emphasis_weight == 1.0 or not emphasis:
            return ids, weights
        spans = self._processor.tokenizer(
            answer, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]
        for word in emphasis:
            start = answer.find(word)
            while word and start >= 0:
                for token, (first, last) in enumerate(spans):
                    if first < start + len(word) and last > start:
                        weights[token] = self._emphasis_weight
                start = answer.find(word, start + len(word))
        return ids, weights


class EncodedSource(Protocol):
    """A data set of encoded examples. Worker processes get a copy of it."""

    def __len__(self) -> int:
        """How many examples an epoch has."""
        ...

    def encoded(self, index: int, epoch: int) -> EncodedExample:
        """One example.

        Raises:
            ExampleError: it cannot be used.
        """
        ...

    def place(self, index: int) -> str: ...


class FreshlyEncoded:
    """Encodes the examples of a source on every access; an `EncodedSource`."""

    def __init__(self, source: ExampleSource, encoder: ExampleEncoder) -> None:
        self._source = source
        self._encoder = encoder

    def __len__(self) -> int:
        """How many examples an epoch has."""
        return len(self._source)

    def encoded(self, index: int, epoch: int) -> EncodedExample:
        return self._encoder.encode(self._source.example(index, epoch))

    def place(self, index: int) -> str:
        return self._source.place(index)
