from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VisionKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VISION_KIND_UNSPECIFIED: _ClassVar[VisionKind]
    VISION_KIND_IMAGE: _ClassVar[VisionKind]
    VISION_KIND_VIDEO: _ClassVar[VisionKind]
VISION_KIND_UNSPECIFIED: VisionKind
VISION_KIND_IMAGE: VisionKind
VISION_KIND_VIDEO: VisionKind

class VisionInput(_message.Message):
    __slots__ = ("kind", "grid_t", "grid_h", "grid_w", "patches")
    KIND_FIELD_NUMBER: _ClassVar[int]
    GRID_T_FIELD_NUMBER: _ClassVar[int]
    GRID_H_FIELD_NUMBER: _ClassVar[int]
    GRID_W_FIELD_NUMBER: _ClassVar[int]
    PATCHES_FIELD_NUMBER: _ClassVar[int]
    kind: VisionKind
    grid_t: int
    grid_h: int
    grid_w: int
    patches: _tensor_pb2.Tensor
    def __init__(self, kind: _Optional[_Union[VisionKind, str]] = ..., grid_t: _Optional[int] = ..., grid_h: _Optional[int] = ..., grid_w: _Optional[int] = ..., patches: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("inputs", "cache_salt", "caller")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedCompositeFieldContainer[VisionInput]
    cache_salt: bytes
    caller: bytes
    def __init__(self, inputs: _Optional[_Iterable[_Union[VisionInput, _Mapping]]] = ..., cache_salt: _Optional[bytes] = ..., caller: _Optional[bytes] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("encoder_digest", "embeddings")
    ENCODER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    encoder_digest: str
    embeddings: _containers.RepeatedCompositeFieldContainer[VisionEmbedding]
    def __init__(self, encoder_digest: _Optional[str] = ..., embeddings: _Optional[_Iterable[_Union[VisionEmbedding, _Mapping]]] = ...) -> None: ...

class VisionEmbedding(_message.Message):
    __slots__ = ("content_digest", "cached", "embedding")
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    content_digest: str
    cached: bool
    embedding: _tensor_pb2.Tensor
    def __init__(self, content_digest: _Optional[str] = ..., cached: bool = ..., embedding: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...
