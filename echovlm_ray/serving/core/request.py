"""Requests and events as plain types, independent of the transport."""

from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from typing import Protocol

from echovlm_ray.events import Accepted, Text
from echovlm_ray.tasks import Language, Task
from protos import router_pb2


class ImageFiles(Iterable[bytes], Sized, Protocol):
    """The files of a request as they were sent. Iterated once, in order; a transport may free them afterwards."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """The sampling parameters; 0 means not set. See `router_pb2.Sampling`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """An unchecked request. See `echovlm_pb2.GenerateRequest` for the fields."""

    task: Task
    language: Language
    prompt: str = ""
    images: ImageFiles = ()
    organs: tuple[str, ...] = ()
    sampling: SamplingOptions = field(default=SamplingOptions())
    # 0 is the server's default.
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    session_key: str = ""
    expert_set_id: str = ""
    for_replay: bool = False
    prompt_digest: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """How an answer came about; the last event. The client has it without messages: `echovlm_ray.client.Summary`.

    Attributes:
        provenance: the experts and their versions, from the router.
        notices: notes for the caller.
        token_ids, prompt_digest: for requests with `for_replay`.
    """

    request_id: str
    finish_reason: router_pb2.FinishReason
    prompt_tokens: int
    completion_tokens: int
    provenance: router_pb2.Provenance
    notices: tuple[str, ...]
    token_ids: tuple[int, ...] = ()
    prompt_digest: str = ""


Event = Accepted | Text | Summary
