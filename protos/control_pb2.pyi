from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExpertSet(_message.Message):
    __slots__ = ("id", "backbone_digest", "routing", "members")
    ID_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    id: str
    backbone_digest: str
    routing: str
    members: _containers.RepeatedCompositeFieldContainer[ExpertSetMember]
    def __init__(self, id: _Optional[str] = ..., backbone_digest: _Optional[str] = ..., routing: _Optional[str] = ..., members: _Optional[_Iterable[_Union[ExpertSetMember, _Mapping]]] = ...) -> None: ...

class ExpertSetMember(_message.Message):
    __slots__ = ("organ", "bundle_digest")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    organ: str
    bundle_digest: str
    def __init__(self, organ: _Optional[str] = ..., bundle_digest: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("organ",)
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    organ: str
    def __init__(self, organ: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("live", "bundles")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    live: ExpertSet
    bundles: _containers.RepeatedCompositeFieldContainer[BundleInfo]
    def __init__(self, live: _Optional[_Union[ExpertSet, _Mapping]] = ..., bundles: _Optional[_Iterable[_Union[BundleInfo, _Mapping]]] = ...) -> None: ...

class BundleInfo(_message.Message):
    __slots__ = ("organ", "name", "version", "digest", "description", "num_experts", "size_bytes", "live")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    organ: str
    name: str
    version: str
    digest: str
    description: str
    num_experts: int
    size_bytes: int
    live: bool
    def __init__(self, organ: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., description: _Optional[str] = ..., num_experts: _Optional[int] = ..., size_bytes: _Optional[int] = ..., live: _Optional[bool] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
