from protos import tensor_pb2 as _tensor_pb2
from protos import vision_pb2 as _vision_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OrganSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORGAN_SOURCE_UNSPECIFIED: _ClassVar[OrganSource]
    ORGAN_SOURCE_CALLER: _ClassVar[OrganSource]
    ORGAN_SOURCE_DICOM: _ClassVar[OrganSource]
    ORGAN_SOURCE_PROTOTYPE: _ClassVar[OrganSource]
    ORGAN_SOURCE_DEFAULT: _ClassVar[OrganSource]
    ORGAN_SOURCE_FLAT: _ClassVar[OrganSource]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
ORGAN_SOURCE_UNSPECIFIED: OrganSource
ORGAN_SOURCE_CALLER: OrganSource
ORGAN_SOURCE_DICOM: OrganSource
ORGAN_SOURCE_PROTOTYPE: OrganSource
ORGAN_SOURCE_DEFAULT: OrganSource
ORGAN_SOURCE_FLAT: OrganSource
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class OrganShare(_message.Message):
    __slots__ = ("organ", "share")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    organ: str
    share: float
    def __init__(self, organ: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class OrganHints(_message.Message):
    __slots__ = ("organs", "anatomy_terms")
    ORGANS_FIELD_NUMBER: _ClassVar[int]
    ANATOMY_TERMS_FIELD_NUMBER: _ClassVar[int]
    organs: _containers.RepeatedScalarFieldContainer[str]
    anatomy_terms: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, organs: _Optional[_Iterable[str]] = ..., anatomy_terms: _Optional[_Iterable[str]] = ...) -> None: ...

class RouterGenerateRequest(_message.Message):
    __slots__ = ("input_ids", "vision_inputs", "organ_hints", "sampling", "max_new_tokens", "stop_token_ids", "return_logits", "ignore_eos", "session_key", "policy_version", "expert_set_id", "cache_salt", "caller", "evaluated_bundle")
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    VISION_INPUTS_FIELD_NUMBER: _ClassVar[int]
    ORGAN_HINTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RETURN_LOGITS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    SESSION_KEY_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SET_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    input_ids: _containers.RepeatedScalarFieldContainer[int]
    vision_inputs: _containers.RepeatedCompositeFieldContainer[_vision_pb2.VisionInput]
    organ_hints: OrganHints
    sampling: Sampling
    max_new_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    return_logits: bool
    ignore_eos: bool
    session_key: str
    policy_version: int
    expert_set_id: str
    cache_salt: bytes
    caller: bytes
    evaluated_bundle: str
    def __init__(self, input_ids: _Optional[_Iterable[int]] = ..., vision_inputs: _Optional[_Iterable[_Union[_vision_pb2.VisionInput, _Mapping]]] = ..., organ_hints: _Optional[_Union[OrganHints, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., return_logits: bool = ..., ignore_eos: bool = ..., session_key: _Optional[str] = ..., policy_version: _Optional[int] = ..., expert_set_id: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., caller: _Optional[bytes] = ..., evaluated_bundle: _Optional[str] = ...) -> None: ...

class RouterGenerateResponse(_message.Message):
    __slots__ = ("token_ids", "logits", "summary", "provenance")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logits: _tensor_pb2.Tensor
    summary: RouterSummary
    provenance: Provenance
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logits: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., summary: _Optional[_Union[RouterSummary, _Mapping]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ...) -> None: ...

class RouterSummary(_message.Message):
    __slots__ = ("finish_reason", "prompt_tokens", "completion_tokens", "provenance")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    provenance: Provenance
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ...) -> None: ...

class Provenance(_message.Message):
    __slots__ = ("expert_set_id", "backbone_digest", "organ_source", "organs")
    EXPERT_SET_ID_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ORGAN_SOURCE_FIELD_NUMBER: _ClassVar[int]
    ORGANS_FIELD_NUMBER: _ClassVar[int]
    expert_set_id: str
    backbone_digest: str
    organ_source: OrganSource
    organs: _containers.RepeatedCompositeFieldContainer[OrganProvenance]
    def __init__(self, expert_set_id: _Optional[str] = ..., backbone_digest: _Optional[str] = ..., organ_source: _Optional[_Union[OrganSource, str]] = ..., organs: _Optional[_Iterable[_Union[OrganProvenance, _Mapping]]] = ...) -> None: ...

class OrganProvenance(_message.Message):
    __slots__ = ("organ", "bundle_version", "bundle_digest", "routed_share")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUTED_SHARE_FIELD_NUMBER: _ClassVar[int]
    organ: str
    bundle_version: str
    bundle_digest: str
    routed_share: float
    def __init__(self, organ: _Optional[str] = ..., bundle_version: _Optional[str] = ..., bundle_digest: _Optional[str] = ..., routed_share: _Optional[float] = ...) -> None: ...

class PinsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinsResponse(_message.Message):
    __slots__ = ("policy_version", "digests")
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    policy_version: int
    digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, policy_version: _Optional[int] = ..., digests: _Optional[_Iterable[str]] = ...) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("organ_hints", "vision_inputs", "session_key")
    ORGAN_HINTS_FIELD_NUMBER: _ClassVar[int]
    VISION_INPUTS_FIELD_NUMBER: _ClassVar[int]
    SESSION_KEY_FIELD_NUMBER: _ClassVar[int]
    organ_hints: OrganHints
    vision_inputs: _containers.RepeatedCompositeFieldContainer[_vision_pb2.VisionInput]
    session_key: str
    def __init__(self, organ_hints: _Optional[_Union[OrganHints, _Mapping]] = ..., vision_inputs: _Optional[_Iterable[_Union[_vision_pb2.VisionInput, _Mapping]]] = ..., session_key: _Optional[str] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("expert_set_id", "organ_source", "organs")
    EXPERT_SET_ID_FIELD_NUMBER: _ClassVar[int]
    ORGAN_SOURCE_FIELD_NUMBER: _ClassVar[int]
    ORGANS_FIELD_NUMBER: _ClassVar[int]
    expert_set_id: str
    organ_source: OrganSource
    organs: _containers.RepeatedCompositeFieldContainer[OrganShare]
    def __init__(self, expert_set_id: _Optional[str] = ..., organ_source: _Optional[_Union[OrganSource, str]] = ..., organs: _Optional[_Iterable[_Union[OrganShare, _Mapping]]] = ...) -> None: ...
