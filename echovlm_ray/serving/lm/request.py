"""Checks a `RouterGenerateRequest` and converts it to the engine's request."""

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from echovlm_ray.config import RouterSection
from echovlm_ray.engine.sequence import SamplingParams, SequenceRequest, VisionDigest
from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.model.configuration import EchoVLMConfig
from echovlm_ray.model.positions import PlaceholderMismatchError, mrope_positions
from echovlm_ray.serving.core.request_checks import check_expert_set_id, check_sampling, check_session_key
from echovlm_ray.serving.lm.admission import Admission
from echovlm_ray.serving.vision.client import EncodedPicture
from protos import router_pb2, vision_pb2
from router.gating.expert_gates import BundleGates
from router.gating.expert_set import ExpertSet

MAX_CACHE_SALT_BYTES = 64
MAX_CALLER_BYTES = 64


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The router's model: its shape and end tokens, and the initial experts.

    Attributes:
        expert_set: the checkpoint's own.
        gates: bundle digest → what was read, of all its members.
        read_gates: reads any other bundle by its digest; this machine's copies of those in use, by their digests, stay.
        end_token_ids: the tokens at which the model ends an answer.
    """

    config: EchoVLMConfig
    expert_set: ExpertSet
    gates: Mapping[str, BundleGates]
    read_gates: Callable[[str, Collection[str]], BundleGates]
    end_token_ids: frozenset[int]


class RequestReader:
    """Checks requests against the model's shape and the configured limits, and converts them for the engine."""

    def __init__(self, model: ServedModel, limits: RouterSection) -> None:
        self._model = model
        self._limits = limits

    def check(self, request: router_pb2.RouterGenerateRequest) -> None:
        """Checks everything that can be checked before the images are encoded.

        Raises:
            InvalidRequestError: names the field, what is wrong with it and what is allowed.
        """
        limits = self._limits
        vocabulary = self._model.config.text_config.vocab_size
        prompt_tokens = len(request.input_ids)
        if not prompt_tokens:
            raise InvalidRequestError("input_ids", "is empty; send at least one token")
        if prompt_tokens > limits.max_prompt_tokens:
            raise InvalidRequestError(
                "input_ids",
                f"the prompt has {prompt_tokens} tokens, images included, and the limit is {limits.max_prompt_tokens} "
                "(router.max_prompt_tokens): shorten it or send fewer or smaller images",
            )
        if (largest := max(request.input_ids)) >= vocabulary:
            raise InvalidRequestError("input_ids", f"holds {largest}, but the vocabulary ends at {vocabulary - 1}")
        if not 1 <= request.max_new_tokens <= limits.max_new_tokens:
            raise InvalidRequestError(
                "max_new_tokens",
                f"is {request.max_new_tokens}; it must be from 1 to {limits.max_new_tokens} (router.max_new_tokens)",
            )
        if request.return_logits and prompt_tokens * vocabulary * 4 > limits.max_logits_bytes:
            raise InvalidRequestError(
                "return_logits",
                f"the prompt's logits take {prompt_tokens * vocabulary * 4} bytes and the limit is "
                f"{limits.max_logits_bytes} (router.max_logits_bytes): send a shorter prompt",
            )

        if len(request.cache_salt) > MAX_CACHE_SALT_BYTES:
            raise InvalidRequestError(
                "cache_salt", f"has {len(request.cache_salt)} bytes; at most {MAX_CACHE_SALT_BYTES} are allowed"
            )
        if len(request.caller) > MAX_CALLER_BYTES:
            raise InvalidRequestError(
                "caller", f"has {len(request.caller)} bytes; at most {MAX_CALLER_BYTES} are allowed"
            )
        check_sampling(request.sampling)
        check_session_key(request.session_key)
        check_expert_set_id(request.expert_set_id, may_be_empty=True)
        self.check_vision(request.vision_inputs)
        for kind, (name, token_id) in self._placeholders().items():
            found = sum(1 for token in request.input_ids if token == token_id)
            given = [item for item in request.vision_inputs if item.kind == kind]
            needed = sum(self.visual_tokens(item) for item in given)
            if found != needed:
                raise InvalidRequestError(
                    "vision_inputs",
                    f"the prompt has {found} {name} placeholder tokens (id {token_id}), but the {len(given)} {name}(s) "
                    f"given fill {needed}: send what the processor made of prompt and images together",
                )

    def check_vision(self, inputs: Sequence[vision_pb2.VisionInput]) -> None:
        """The images' part of `check`."""
        merge = self._model.config.vision_config.spatial_merge_size
        for index, item in enumerate(inputs):
            if item.kind not in self._placeholders():
                raise InvalidRequestError(f"vision_inputs[{index}].kind", "must be an image or a video")
            if not item.grid_t or not item.grid_h or not item.grid_w or item.grid_h % merge or item.grid_w % merge:
                raise InvalidRequestError(
                    f"vision_inputs[{index}]",
                    f"has the grid {item.grid_t} × {item.grid_h} × {item.grid_w}: no side may be 0, and height and "
                    f"width must be multiples of {merge} (spatial_merge_size)",
                )

    def _placeholders(self) -> dict[int, tuple[str, int]]:
        config = self._model.config
        return {
            vision_pb2.VISION_KIND_IMAGE: ("image", config.image_token_id),
            vision_pb2.VISION_KIND_VIDEO: ("video", config.video_token_id),
        }

    def visual_tokens(self, item: vision_pb2.VisionInput) -> int:
        """How many placeholders an input fills."""
        merge = self._model.config.vision_config.spatial_merge_size
        return int(item.grid_t * (item.grid_h // merge) * (item.grid_w // merge))

    def expected_embeddings(self, inputs: Sequence[vision_pb2.VisionInput]) -> list[tuple[int, int]]:
        """The shapes of what the vision encoder makes of them."""
        return [(self.visual_tokens(item), self._model.config.text_config.hidden_size) for item in inputs]

    def sequence_request(
        self,
        request: router_pb2.RouterGenerateRequest,
        pictures: list[EncodedPicture],
        deadline: float,
        admission: Admission,
    ) -> SequenceRequest:
        """The engine's request with its experts; beside a shadow it gets a seed, so that the shadow draws as it does.

        Raises:
            InvalidRequestError: the placeholders do not fit the images.
        """
        config = self._model.config
        input_ids = torch.tensor(list(request.input_ids))
        rows, visual, digests = self.place_vision(input_ids, request.vision_inputs, pictures)
        grids = {
            kind: [(item.grid_t, item.grid_h, item.grid_w) for item in request.vision_inputs if item.kind == kind]
            for kind in (vision_pb2.VISION_KIND_IMAGE, vision_pb2.VISION_KIND_VIDEO)
        }
        try:
            position_ids, delta = mrope_positions(
                input_ids, grids[vision_pb2.VISION_KIND_IMAGE], grids[vision_pb2.VISION_KIND_VIDEO], config
            )
        except PlaceholderMismatchError as error:
            raise InvalidRequestError("vision_inputs", str(error)) from error
        stop_token_ids = frozenset(request.stop_token_ids)
        if not stop_token_ids and not request.ignore_eos:
            stop_token_ids = self._model.end_token_ids
        return SequenceRequest(
            input_ids=tuple(request.input_ids),
            position_ids_3T=position_ids,
            position_delta=delta,
            expert_set_id=admission.experts.expert_set.id,
            shares=admission.experts.choice.shares,
            max_new_tokens=request.max_new_tokens,
            vision_rows_V=rows,
            vision_embeddings_VD=visual,
            vision_digests=digests,
            sampling=_sampling(request.sampling, needs_seed=admission.shadow is not None),
            stop_token_ids=stop_token_ids,
            return_logits=request.return_logits,
            deadline=deadline,
            cache_salt=request.cache_salt,
            caller=request.caller,
            background=bool(request.evaluated_bundle),
        )

    def place_vision(
        self, input_ids: torch.Tensor, inputs: Sequence[vision_pb2.VisionInput], pictures: list[EncodedPicture]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[VisionDigest, ...]]:
        """The prompt positions of all placeholders, ascending; the embeddings that replace them; whose each row is."""
        if not pictures:
            return None, None, ()
        # The pictures of each kind fill that kind's placeholders from the first to the last.
        places: list[tuple[torch.Tensor, EncodedPicture]] = []
        for kind, (_, token_id) in self._placeholders().items():
            own = [picture for item, picture in zip(inputs, pictures, strict=True) if item.kind == kind]
            placeholders = (input_ids == token_id).nonzero()[:, 0]
            parts = placeholders.split([len(picture.embedding) for picture in own])
            places += zip(parts, own, strict=True)
        places.sort(key=lambda place: int(place[0][0]))
        digests = []
        end = 0
        for part, picture in places:
            start, end = end, end + len(part)
            digests.append(VisionDigest(start, end, picture.content_digest))
        rows = torch.cat([part for part, _ in places])
        return rows, torch.cat([picture.embedding for _, picture in places]), tuple(digests)


def _sampling(sampling: router_pb2.Sampling, *, needs_seed: bool) -> SamplingParams:
    seed = sampling.seed if sampling.HasField("seed") else None
    if seed is None and needs_seed and sampling.temperature > 0:
        seed = secrets.randbits(64)
    # Zero is proto3's "not set": for top_p and the penalty that means no change.
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p or 1.0,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        seed=seed,
    )
