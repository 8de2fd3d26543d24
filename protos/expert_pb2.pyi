from google.rpc import status_pb2 as _status_pb2
from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ForwardRequest(_message.Message):
    __slots__ = ("correlation_id", "bundle_digest", "layer", "expert_index", "weight", "attach", "shared", "hidden_states")
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_INDEX_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    correlation_id: int
    bundle_digest: str
    layer: int
    expert_index: _tensor_pb2.Tensor
    weight: _tensor_pb2.Tensor
    attach: SharedMemory
    shared: SharedTensors
    hidden_states: _tensor_pb2.Tensor
    def __init__(self, correlation_id: _Optional[int] = ..., bundle_digest: _Optional[str] = ..., layer: _Optional[int] = ..., expert_index: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weight: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., attach: _Optional[_Union[SharedMemory, _Mapping]] = ..., shared: _Optional[_Union[SharedTensors, _Mapping]] = ..., hidden_states: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("process_id", "descriptor", "size", "token", "secret")
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    process_id: int
    descriptor: int
    size: int
    token: bytes
    secret: str
    def __init__(self, process_id: _Optional[int] = ..., descriptor: _Optional[int] = ..., size: _Optional[int] = ..., token: _Optional[bytes] = ..., secret: _Optional[str] = ...) -> None: ...

class SharedTensors(_message.Message):
    __slots__ = ("offset", "dtype", "tokens", "hidden_size", "top_k")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    offset: int
    dtype: _tensor_pb2.DataType
    tokens: int
    hidden_size: int
    top_k: int
    def __init__(self, offset: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., tokens: _Optional[int] = ..., hidden_size: _Optional[int] = ..., top_k: _Optional[int] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("correlation_id", "error", "compute_ns", "output_in_place", "attached", "output")
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    correlation_id: int
    error: _status_pb2.Status
    compute_ns: int
    output_in_place: bool
    attached: str
    output: _tensor_pb2.Tensor
    def __init__(self, correlation_id: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., compute_ns: _Optional[int] = ..., output_in_place: bool = ..., attached: _Optional[str] = ..., output: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("organ", "bundles", "exchanges_in_flight", "local_address", "instance", "host", "limit_bytes", "loading", "local_socket")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    EXCHANGES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SOCKET_FIELD_NUMBER: _ClassVar[int]
    organ: str
    bundles: _containers.RepeatedCompositeFieldContainer[ResidentBundle]
    exchanges_in_flight: int
    local_address: str
    instance: str
    host: str
    limit_bytes: int
    loading: _containers.RepeatedCompositeFieldContainer[LoadingBundle]
    local_socket: str
    def __init__(self, organ: _Optional[str] = ..., bundles: _Optional[_Iterable[_Union[ResidentBundle, _Mapping]]] = ..., exchanges_in_flight: _Optional[int] = ..., local_address: _Optional[str] = ..., instance: _Optional[str] = ..., host: _Optional[str] = ..., limit_bytes: _Optional[int] = ..., loading: _Optional[_Iterable[_Union[LoadingBundle, _Mapping]]] = ..., local_socket: _Optional[str] = ...) -> None: ...

class LoadingBundle(_message.Message):
    __slots__ = ("digest", "progress")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    progress: float
    def __init__(self, digest: _Optional[str] = ..., progress: _Optional[float] = ...) -> None: ...

class ResidentBundle(_message.Message):
    __slots__ = ("digest", "name", "version", "resident_bytes", "kernel", "dtype", "bundle_dtype")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    name: str
    version: str
    resident_bytes: int
    kernel: str
    dtype: str
    bundle_dtype: str
    def __init__(self, digest: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., resident_bytes: _Optional[int] = ..., kernel: _Optional[str] = ..., dtype: _Optional[str] = ..., bundle_dtype: _Optional[str] = ...) -> None: ...
