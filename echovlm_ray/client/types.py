"""The responses of a server as plain frozen dataclasses. `from_proto` of each reads its message."""

from dataclasses import dataclass
from typing import Self

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from echovlm_ray.events import Accepted, Text
from protos import echovlm_pb2, router_pb2


@dataclass(frozen=True, slots=True)
class OrganShare:
    """One organ's share of an answer.

    Attributes:
        organ: its name.
        bundle_version: the version of its experts.
        bundle_digest: the digest of that version.
        routed_share: the organ's share of all (token, layer, expert) choices, from 0 to 1.
    """

    organ: str
    bundle_version: str
    bundle_digest: str
    routed_share: float

    @classmethod
    def from_proto(cls, message: router_pb2.OrganProvenance) -> Self:
        """Reads the message."""
        return cls(message.organ, message.bundle_version, message.bundle_digest, message.routed_share)


@dataclass(frozen=True, slots=True)
class Provenance:
    """The experts that produced an answer.

    Attributes:
        expert_set_id: the identity of the expert set that the request was pinned to.
        backbone_digest: the identity of the backbone, which all organs share.
        organ_source: how the organs were determined: "caller", "dicom", "prototype", "default", or "flat" when one gate
            spans all organs.
        organs: the organs used.
    """

    expert_set_id: str
    backbone_digest: str
    organ_source: str
    organs: tuple[OrganShare, ...]

    @classmethod
    def from_proto(cls, message: router_pb2.Provenance) -> Self:
        """Reads the message."""
        organs = tuple(OrganShare.from_proto(organ) for organ in message.organs)
        source = _enum_name(router_pb2.OrganSource, message.organ_source, "ORGAN_SOURCE_")
        return cls(message.expert_set_id, message.backbone_digest, source, organs)


@dataclass(frozen=True, slots=True)
class Summary:
    """The summary of an answer; the last event of a stream.

    Attributes:
        request_id: the id under which the server logs the request.
        finish_reason: "stop" at an end token or a stop string, "length" at the limit of new tokens.
        prompt_tokens: length of the prompt, visual tokens included.
        completion_tokens: the number of generated tokens.
        provenance: the experts and their versions.
        notices: notes for the caller, for example that the organ was unknown and the default was used.
        token_ids: the answer's tokens, for requests with `for_replay`.
        prompt_digest: SHA-256 of the prompt's tokens, for requests with `for_replay`.
    """

    request_id: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    provenance: Provenance
    notices: tuple[str, ...]
    token_ids: tuple[int, ...] = ()
    prompt_digest: str = ""

    @classmethod
    def from_proto(cls, message: echovlm_pb2.GenerateSummary) -> Self:
        """Reads the message."""
        return cls(
            request_id=message.request_id,
            finish_reason=_enum_name(router_pb2.FinishReason, message.finish_reason, "FINISH_REASON_"),
            prompt_tokens=message.prompt_tokens,
            completion_tokens=message.completion_tokens,
            provenance=Provenance.from_proto(message.provenance),
            notices=tuple(message.notices),
            token_ids=tuple(message.token_ids),
            prompt_digest=message.prompt_digest,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer."""

    text: str
    summary: Summary

    def __str__(self) -> str:
        """Returns the text."""
        return self.text


Event = Accepted | Text | Summary


def event_from_proto(message: echovlm_pb2.GenerateEvent) -> Event | None:
    """Reads one event of a stream; None for a kind that this client does not support."""
    match message.WhichOneof("event"):
        case "accepted":
            accepted = message.accepted
            return Accepted(accepted.prompt_tokens, accepted.visual_tokens, tuple(accepted.frames))
        case "text":
            return Text(message.text)
        case "summary":
            return Summary.from_proto(message.summary)
        case _:
            return None


@dataclass(frozen=True, slots=True)
class Organ:
    """A live organ with the version of its experts."""

    organ: str
    bundle_version: str
    bundle_digest: str
    num_experts: int

    @classmethod
    def from_proto(cls, message: echovlm_pb2.OrganInfo) -> Self:
        """Reads the message."""
        return cls(message.organ, message.bundle_version, message.bundle_digest, message.num_experts)


@dataclass(frozen=True, slots=True)
class Limits:
    """The server's limits for one request."""

    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    max_frames: int
    max_prompt_tokens: int
    max_new_tokens: int

    @classmethod
    def from_proto(cls, message: echovlm_pb2.Limits) -> Self:
        """Reads the message."""
        return cls(
            max_images=message.max_images,
            max_image_bytes=message.max_image_bytes,
            max_image_pixels=message.max_image_pixels,
            max_frames=message.max_frames,
            max_prompt_tokens=message.max_prompt_tokens,
            max_new_tokens=message.max_new_tokens,
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The description of a server.

    Attributes:
        expert_set_id: the identity of the live expert set.
        default_organ: the organ of requests whose organ is unknown.
        description: the intended and the excluded use of the model.
    """

    name: str
    version: str
    description: str
    backbone_digest: str
    expert_set_id: str
    default_organ: str
    organs: tuple[Organ, ...]
    limits: Limits

    @classmethod
    def from_proto(cls, message: echovlm_pb2.ModelInfo) -> Self:
        """Reads the message."""
        return cls(
            name=message.name,
            version=message.version,
            description=message.description,
            backbone_digest=message.backbone_digest,
            expert_set_id=message.expert_set_id,
            default_organ=message.default_organ,
            organs=tuple(Organ.from_proto(organ) for organ in message.organs),
            limits=Limits.from_proto(message.limits),
        )


def _enum_name(enum: EnumTypeWrapper, value: int, prefix: str) -> str:
    # A newer server may send a value that is unknown here.
    name = next((name for name, number in enum.items() if number == value), f"{prefix}{value}")
    return name.removeprefix(prefix).lower()
