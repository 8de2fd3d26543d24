from protos import router_pb2 as _router_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_REPORT: _ClassVar[Task]
    TASK_FINDINGS: _ClassVar[Task]
    TASK_IMPRESSION: _ClassVar[Task]
    TASK_DIAGNOSIS: _ClassVar[Task]
    TASK_CAPTION: _ClassVar[Task]
    TASK_VQA: _ClassVar[Task]

class Language(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LANGUAGE_UNSPECIFIED: _ClassVar[Language]
    LANGUAGE_ENGLISH: _ClassVar[Language]
    LANGUAGE_CHINESE: _ClassVar[Language]
TASK_UNSPECIFIED: Task
TASK_REPORT: Task
TASK_FINDINGS: Task
TASK_IMPRESSION: Task
TASK_DIAGNOSIS: Task
TASK_CAPTION: Task
TASK_VQA: Task
LANGUAGE_UNSPECIFIED: Language
LANGUAGE_ENGLISH: Language
LANGUAGE_CHINESE: Language

class ImageFile(_message.Message):
    __slots__ = ("content",)
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    def __init__(self, content: _Optional[bytes] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("task", "language", "prompt", "images", "organs", "sampling", "max_new_tokens", "stop", "session_key", "expert_set_id", "for_replay", "prompt_digest")
    TASK_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    ORGANS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SESSION_KEY_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SET_ID_FIELD_NUMBER: _ClassVar[int]
    FOR_REPLAY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    task: Task
    language: Language
    prompt: str
    images: _containers.RepeatedCompositeFieldContainer[ImageFile]
    organs: _containers.RepeatedScalarFieldContainer[str]
    sampling: _router_pb2.Sampling
    max_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    session_key: str
    expert_set_id: str
    for_replay: bool
    prompt_digest: str
    def __init__(self, task: _Optional[_Union[Task, str]] = ..., language: _Optional[_Union[Language, str]] = ..., prompt: _Optional[str] = ..., images: _Optional[_Iterable[_Union[ImageFile, _Mapping]]] = ..., organs: _Optional[_Iterable[str]] = ..., sampling: _Optional[_Union[_router_pb2.Sampling, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., session_key: _Optional[str] = ..., expert_set_id: _Optional[str] = ..., for_replay: bool = ..., prompt_digest: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "summary")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    text: str
    summary: GenerateSummary
    def __init__(self, text: _Optional[str] = ..., summary: _Optional[_Union[GenerateSummary, _Mapping]] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("accepted", "text", "summary")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    accepted: RequestAccepted
    text: str
    summary: GenerateSummary
    def __init__(self, accepted: _Optional[_Union[RequestAccepted, _Mapping]] = ..., text: _Optional[str] = ..., summary: _Optional[_Union[GenerateSummary, _Mapping]] = ...) -> None: ...

class RequestAccepted(_message.Message):
    __slots__ = ("prompt_tokens", "visual_tokens", "frames")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    visual_tokens: int
    frames: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, prompt_tokens: _Optional[int] = ..., visual_tokens: _Optional[int] = ..., frames: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateSummary(_message.Message):
    __slots__ = ("request_id", "finish_reason", "prompt_tokens", "completion_tokens", "provenance", "notices", "token_ids", "prompt_digest")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    finish_reason: _router_pb2.FinishReason
    prompt_tokens: int
    completion_tokens: int
    provenance: _router_pb2.Provenance
    notices: _containers.RepeatedScalarFieldContainer[str]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_digest: str
    def __init__(self, request_id: _Optional[str] = ..., finish_reason: _Optional[_Union[_router_pb2.FinishReason, str]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., provenance: _Optional[_Union[_router_pb2.Provenance, _Mapping]] = ..., notices: _Optional[_Iterable[str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_digest: _Optional[str] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "version", "backbone_digest", "expert_set_id", "organs", "limits", "default_organ", "description")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SET_ID_FIELD_NUMBER: _ClassVar[int]
    ORGANS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_ORGAN_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    backbone_digest: str
    expert_set_id: str
    organs: _containers.RepeatedCompositeFieldContainer[OrganInfo]
    limits: Limits
    default_organ: str
    description: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., backbone_digest: _Optional[str] = ..., expert_set_id: _Optional[str] = ..., organs: _Optional[_Iterable[_Union[OrganInfo, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., default_organ: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...

class OrganInfo(_message.Message):
    __slots__ = ("organ", "bundle_version", "bundle_digest", "num_experts")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    organ: str
    bundle_version: str
    bundle_digest: str
    num_experts: int
    def __init__(self, organ: _Optional[str] = ..., bundle_version: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., num_experts: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_images", "max_image_bytes", "max_image_pixels", "max_frames", "max_prompt_tokens", "max_new_tokens")
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    max_frames: int
    max_prompt_tokens: int
    max_new_tokens: int
    def __init__(self, max_images: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., max_frames: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ...) -> None: ...
