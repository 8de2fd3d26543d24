from google.rpc import status_pb2 as _status_pb2
from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ForwardRequest(_message.Message):
    __slots__ = ("correlation_id", "bundle_digest", "layer", "expert_index", "weight", "hidden_states")
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_INDEX_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    correlation_id: int
    bundle_digest: str
    layer: int
    expert_index: _tensor_pb2.Tensor
    weight: _tensor_pb2.Tensor
    hidden_states: _tensor_pb2.Tensor
    def __init__(self, correlation_id: _Optional[int] = ..., bundle_digest: _Optional[str] = ..., layer: _Optional[int] = ..., expert_index: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weight: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., hidden_states: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("correlation_id", "error", "output")
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    correlation_id: int
    error: _status_pb2.Status
    output: _tensor_pb2.Tensor
    def __init__(self, correlation_id: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., output: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("bundle_digest",)
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    def __init__(self, bundle_digest: _Optional[str] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: ResidentBundle
    def __init__(self, bundle: _Optional[_Union[ResidentBundle, _Mapping]] = ...) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("bundle_digest",)
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    bundle_digest: str
    def __init__(self, bundle_digest: _Optional[str] = ...) -> None: ...

class UnloadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpertGroupStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpertGroupStatusResponse(_message.Message):
    __slots__ = ("organ", "bundles", "exchanges_in_flight")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    EXCHANGES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    organ: str
    bundles: _containers.RepeatedCompositeFieldContainer[ResidentBundle]
    exchanges_in_flight: int
    def __init__(self, organ: _Optional[str] = ..., bundles: _Optional[_Iterable[_Union[ResidentBundle, _Mapping]]] = ..., exchanges_in_flight: _Optional[int] = ...) -> None: ...

class ResidentBundle(_message.Message):
    __slots__ = ("digest", "name", "version", "resident_bytes", "kernel")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    digest: str
    name: str
    version: str
    resident_bytes: int
    kernel: str
    def __init__(self, digest: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., resident_bytes: _Optional[int] = ..., kernel: _Optional[str] = ...) -> None: ...
