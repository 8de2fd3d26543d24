from protos import control_pb2 as _control_pb2
from protos import expert_pb2 as _expert_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReplicaDescription(_message.Message):
    __slots__ = ("application", "deployment", "replica_id", "endpoint", "node", "pid", "device", "resident_bytes", "queue_length", "organ", "bundles", "problem", "arithmetic", "refusals")
    APPLICATION_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ARITHMETIC_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    application: str
    deployment: str
    replica_id: str
    endpoint: str
    node: str
    pid: int
    device: str
    resident_bytes: int
    queue_length: int
    organ: str
    bundles: _containers.RepeatedCompositeFieldContainer[_expert_pb2.ResidentBundle]
    problem: str
    arithmetic: str
    refusals: _containers.RepeatedCompositeFieldContainer[Refusals]
    def __init__(self, application: _Optional[str] = ..., deployment: _Optional[str] = ..., replica_id: _Optional[str] = ..., endpoint: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., resident_bytes: _Optional[int] = ..., queue_length: _Optional[int] = ..., organ: _Optional[str] = ..., bundles: _Optional[_Iterable[_Union[_expert_pb2.ResidentBundle, _Mapping]]] = ..., problem: _Optional[str] = ..., arithmetic: _Optional[str] = ..., refusals: _Optional[_Iterable[_Union[Refusals, _Mapping]]] = ...) -> None: ...

class Refusals(_message.Message):
    __slots__ = ("reason", "caller", "count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    caller: str
    count: int
    def __init__(self, reason: _Optional[str] = ..., caller: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("applications", "expert_set_id", "problems", "identity", "notices")
    APPLICATIONS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SET_ID_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    applications: _containers.RepeatedCompositeFieldContainer[ApplicationStatus]
    expert_set_id: str
    problems: _containers.RepeatedCompositeFieldContainer[_control_pb2.OrganProblem]
    identity: str
    notices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, applications: _Optional[_Iterable[_Union[ApplicationStatus, _Mapping]]] = ..., expert_set_id: _Optional[str] = ..., problems: _Optional[_Iterable[_Union[_control_pb2.OrganProblem, _Mapping]]] = ..., identity: _Optional[str] = ..., notices: _Optional[_Iterable[str]] = ...) -> None: ...

class ApplicationStatus(_message.Message):
    __slots__ = ("name", "status", "message", "replicas")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    status: str
    message: str
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaDescription]
    def __init__(self, name: _Optional[str] = ..., status: _Optional[str] = ..., message: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[ReplicaDescription, _Mapping]]] = ...) -> None: ...
