from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
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

class PushRequest(_message.Message):
    __slots__ = ("manifest", "file", "data", "signature")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    file: str
    data: bytes
    signature: bytes
    def __init__(self, manifest: _Optional[bytes] = ..., file: _Optional[str] = ..., data: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: BundleInfo
    def __init__(self, bundle: _Optional[_Union[BundleInfo, _Mapping]] = ...) -> None: ...

class StageRequest(_message.Message):
    __slots__ = ("organ", "version", "digest", "actor", "reason", "dry_run")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    organ: str
    version: str
    digest: str
    actor: str
    reason: str
    dry_run: bool
    def __init__(self, organ: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class Expected(_message.Message):
    __slots__ = ("rollout_id", "state", "percent", "stable_digest", "nothing_in_flight")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    STABLE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NOTHING_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    state: str
    percent: float
    stable_digest: str
    nothing_in_flight: bool
    def __init__(self, rollout_id: _Optional[str] = ..., state: _Optional[str] = ..., percent: _Optional[float] = ..., stable_digest: _Optional[str] = ..., nothing_in_flight: bool = ...) -> None: ...

class TrafficRequest(_message.Message):
    __slots__ = ("organ", "percent", "digest", "actor", "reason", "dry_run", "expected", "gates_json", "override")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    GATES_JSON_FIELD_NUMBER: _ClassVar[int]
    OVERRIDE_FIELD_NUMBER: _ClassVar[int]
    organ: str
    percent: float
    digest: str
    actor: str
    reason: str
    dry_run: bool
    expected: Expected
    gates_json: str
    override: bool
    def __init__(self, organ: _Optional[str] = ..., percent: _Optional[float] = ..., digest: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., dry_run: bool = ..., expected: _Optional[_Union[Expected, _Mapping]] = ..., gates_json: _Optional[str] = ..., override: bool = ...) -> None: ...

class OrganRequest(_message.Message):
    __slots__ = ("organ", "digest", "actor", "reason", "dry_run", "expected", "gates_json", "override")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    GATES_JSON_FIELD_NUMBER: _ClassVar[int]
    OVERRIDE_FIELD_NUMBER: _ClassVar[int]
    organ: str
    digest: str
    actor: str
    reason: str
    dry_run: bool
    expected: Expected
    gates_json: str
    override: bool
    def __init__(self, organ: _Optional[str] = ..., digest: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., dry_run: bool = ..., expected: _Optional[_Union[Expected, _Mapping]] = ..., gates_json: _Optional[str] = ..., override: bool = ...) -> None: ...

class RollBackStableRequest(_message.Message):
    __slots__ = ("organ", "version", "digest", "actor", "reason", "dry_run", "expected")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    organ: str
    version: str
    digest: str
    actor: str
    reason: str
    dry_run: bool
    expected: Expected
    def __init__(self, organ: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., dry_run: bool = ..., expected: _Optional[_Union[Expected, _Mapping]] = ...) -> None: ...

class RetireRequest(_message.Message):
    __slots__ = ("organ", "version", "digest", "actor", "reason", "dry_run", "expected")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    organ: str
    version: str
    digest: str
    actor: str
    reason: str
    dry_run: bool
    expected: Expected
    def __init__(self, organ: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., dry_run: bool = ..., expected: _Optional[_Union[Expected, _Mapping]] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("rollout_json", "actor", "dry_run")
    ROLLOUT_JSON_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    rollout_json: str
    actor: str
    dry_run: bool
    def __init__(self, rollout_json: _Optional[str] = ..., actor: _Optional[str] = ..., dry_run: bool = ...) -> None: ...

class OperationResponse(_message.Message):
    __slots__ = ("changed", "steps", "rollout", "memory", "not_taken_up")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    NOT_TAKEN_UP_FIELD_NUMBER: _ClassVar[int]
    changed: bool
    steps: _containers.RepeatedScalarFieldContainer[str]
    rollout: Rollout
    memory: _containers.RepeatedCompositeFieldContainer[ReplicaMemory]
    not_taken_up: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, changed: bool = ..., steps: _Optional[_Iterable[str]] = ..., rollout: _Optional[_Union[Rollout, _Mapping]] = ..., memory: _Optional[_Iterable[_Union[ReplicaMemory, _Mapping]]] = ..., not_taken_up: _Optional[_Iterable[str]] = ...) -> None: ...

class ReplicaMemory(_message.Message):
    __slots__ = ("replica", "resident_bytes", "needed_bytes", "limit_bytes", "fits")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NEEDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    resident_bytes: int
    needed_bytes: int
    limit_bytes: int
    fits: bool
    def __init__(self, replica: _Optional[str] = ..., resident_bytes: _Optional[int] = ..., needed_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., fits: bool = ...) -> None: ...

class Rollout(_message.Message):
    __slots__ = ("id", "organ", "version", "digest", "incumbent_digest", "state", "percent", "reason", "actor", "created_at", "state_since", "shadow", "restores", "waits_for", "gates")
    ID_FIELD_NUMBER: _ClassVar[int]
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    STATE_SINCE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    GATES_FIELD_NUMBER: _ClassVar[int]
    id: str
    organ: str
    version: str
    digest: str
    incumbent_digest: str
    state: str
    percent: float
    reason: str
    actor: str
    created_at: float
    state_since: float
    shadow: ShadowReport
    restores: bool
    waits_for: str
    gates: _containers.RepeatedCompositeFieldContainer[Gate]
    def __init__(self, id: _Optional[str] = ..., organ: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., incumbent_digest: _Optional[str] = ..., state: _Optional[str] = ..., percent: _Optional[float] = ..., reason: _Optional[str] = ..., actor: _Optional[str] = ..., created_at: _Optional[float] = ..., state_since: _Optional[float] = ..., shadow: _Optional[_Union[ShadowReport, _Mapping]] = ..., restores: bool = ..., waits_for: _Optional[str] = ..., gates: _Optional[_Iterable[_Union[Gate, _Mapping]]] = ...) -> None: ...

class Gate(_message.Message):
    __slots__ = ("dataset", "dataset_digest", "metric", "organ", "at_least", "not_below_incumbent_by", "state", "answered", "questions", "evaluation", "organs")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    DATASET_DIGEST_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    NOT_BELOW_INCUMBENT_BY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    ORGANS_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    dataset_digest: str
    metric: str
    organ: str
    at_least: float
    not_below_incumbent_by: float
    state: str
    answered: int
    questions: int
    evaluation: Evaluation
    organs: str
    def __init__(self, dataset: _Optional[str] = ..., dataset_digest: _Optional[str] = ..., metric: _Optional[str] = ..., organ: _Optional[str] = ..., at_least: _Optional[float] = ..., not_below_incumbent_by: _Optional[float] = ..., state: _Optional[str] = ..., answered: _Optional[int] = ..., questions: _Optional[int] = ..., evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., organs: _Optional[str] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("rollout_id", "organ", "version", "digest", "dataset", "dataset_digest", "metric", "passed", "text", "records", "value", "low", "high", "incumbent_digest", "incumbent_value", "difference", "difference_low", "difference_high", "evaluated_at")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    DATASET_DIGEST_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_VALUE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_LOW_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_HIGH_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_AT_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    organ: str
    version: str
    digest: str
    dataset: str
    dataset_digest: str
    metric: str
    passed: bool
    text: str
    records: int
    value: float
    low: float
    high: float
    incumbent_digest: str
    incumbent_value: float
    difference: float
    difference_low: float
    difference_high: float
    evaluated_at: float
    def __init__(self, rollout_id: _Optional[str] = ..., organ: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., dataset: _Optional[str] = ..., dataset_digest: _Optional[str] = ..., metric: _Optional[str] = ..., passed: bool = ..., text: _Optional[str] = ..., records: _Optional[int] = ..., value: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., incumbent_digest: _Optional[str] = ..., incumbent_value: _Optional[float] = ..., difference: _Optional[float] = ..., difference_low: _Optional[float] = ..., difference_high: _Optional[float] = ..., evaluated_at: _Optional[float] = ...) -> None: ...

class ShadowReport(_message.Message):
    __slots__ = ("requests", "identical", "token_overlap", "mean_first_divergence", "latency_ratio")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    IDENTICAL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_OVERLAP_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIRST_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_RATIO_FIELD_NUMBER: _ClassVar[int]
    requests: int
    identical: int
    token_overlap: float
    mean_first_divergence: float
    latency_ratio: float
    def __init__(self, requests: _Optional[int] = ..., identical: _Optional[int] = ..., token_overlap: _Optional[float] = ..., mean_first_divergence: _Optional[float] = ..., latency_ratio: _Optional[float] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("organ",)
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    organ: str
    def __init__(self, organ: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("live", "bundles", "rollouts", "replicas", "problems", "registry_problem", "notices", "evaluations")
    LIVE_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    live: ExpertSet
    bundles: _containers.RepeatedCompositeFieldContainer[BundleInfo]
    rollouts: _containers.RepeatedCompositeFieldContainer[Rollout]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaResidents]
    problems: _containers.RepeatedCompositeFieldContainer[OrganProblem]
    registry_problem: str
    notices: _containers.RepeatedScalarFieldContainer[str]
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    def __init__(self, live: _Optional[_Union[ExpertSet, _Mapping]] = ..., bundles: _Optional[_Iterable[_Union[BundleInfo, _Mapping]]] = ..., rollouts: _Optional[_Iterable[_Union[Rollout, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaResidents, _Mapping]]] = ..., problems: _Optional[_Iterable[_Union[OrganProblem, _Mapping]]] = ..., registry_problem: _Optional[str] = ..., notices: _Optional[_Iterable[str]] = ..., evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ...) -> None: ...

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
    def __init__(self, organ: _Optional[str] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., description: _Optional[str] = ..., num_experts: _Optional[int] = ..., size_bytes: _Optional[int] = ..., live: bool = ...) -> None: ...

class ReplicaResidents(_message.Message):
    __slots__ = ("organ", "replica", "limit_bytes", "bundles")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    organ: str
    replica: str
    limit_bytes: int
    bundles: _containers.RepeatedCompositeFieldContainer[ResidentShare]
    def __init__(self, organ: _Optional[str] = ..., replica: _Optional[str] = ..., limit_bytes: _Optional[int] = ..., bundles: _Optional[_Iterable[_Union[ResidentShare, _Mapping]]] = ...) -> None: ...

class OrganProblem(_message.Message):
    __slots__ = ("organ", "version", "digest", "replicas", "holding", "reasons")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    organ: str
    version: str
    digest: str
    replicas: int
    holding: int
    reasons: _containers.RepeatedCompositeFieldContainer[ReplicaProblem]
    def __init__(self, organ: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., replicas: _Optional[int] = ..., holding: _Optional[int] = ..., reasons: _Optional[_Iterable[_Union[ReplicaProblem, _Mapping]]] = ...) -> None: ...

class ReplicaProblem(_message.Message):
    __slots__ = ("replica", "text")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    replica: str
    text: str
    def __init__(self, replica: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class ResidentShare(_message.Message):
    __slots__ = ("digest", "resident_bytes", "progress", "spare")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    resident_bytes: int
    progress: float
    spare: bool
    def __init__(self, digest: _Optional[str] = ..., resident_bytes: _Optional[int] = ..., progress: _Optional[float] = ..., spare: bool = ...) -> None: ...

class HistoryRequest(_message.Message):
    __slots__ = ("organ", "last", "verify", "noted_hash")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    NOTED_HASH_FIELD_NUMBER: _ClassVar[int]
    organ: str
    last: int
    verify: bool
    noted_hash: str
    def __init__(self, organ: _Optional[str] = ..., last: _Optional[int] = ..., verify: bool = ..., noted_hash: _Optional[str] = ...) -> None: ...

class HistoryResponse(_message.Message):
    __slots__ = ("entries", "length", "head_hash", "faults")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    HEAD_HASH_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[HistoryEntry]
    length: int
    head_hash: str
    faults: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, entries: _Optional[_Iterable[_Union[HistoryEntry, _Mapping]]] = ..., length: _Optional[int] = ..., head_hash: _Optional[str] = ..., faults: _Optional[_Iterable[str]] = ...) -> None: ...

class HistoryEntry(_message.Message):
    __slots__ = ("sequence", "time", "organ", "rollout_id", "event", "actor", "reason", "details_json", "hash")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAILS_JSON_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: float
    organ: str
    rollout_id: str
    event: str
    actor: str
    reason: str
    details_json: str
    hash: str
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[float] = ..., organ: _Optional[str] = ..., rollout_id: _Optional[str] = ..., event: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., details_json: _Optional[str] = ..., hash: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ControlState(_message.Message):
    __slots__ = ("version", "live", "rollouts", "replicas", "not_taken_up", "problems")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NOT_TAKEN_UP_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    version: int
    live: ExpertSet
    rollouts: _containers.RepeatedCompositeFieldContainer[Rollout]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaResidents]
    not_taken_up: _containers.RepeatedScalarFieldContainer[str]
    problems: _containers.RepeatedCompositeFieldContainer[OrganProblem]
    def __init__(self, version: _Optional[int] = ..., live: _Optional[_Union[ExpertSet, _Mapping]] = ..., rollouts: _Optional[_Iterable[_Union[Rollout, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaResidents, _Mapping]]] = ..., not_taken_up: _Optional[_Iterable[str]] = ..., problems: _Optional[_Iterable[_Union[OrganProblem, _Mapping]]] = ...) -> None: ...

class WatchPolicyRequest(_message.Message):
    __slots__ = ("router", "gateway", "identity", "policy_version", "policy_digest")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    router: str
    gateway: str
    identity: str
    policy_version: int
    policy_digest: str
    def __init__(self, router: _Optional[str] = ..., gateway: _Optional[str] = ..., identity: _Optional[str] = ..., policy_version: _Optional[int] = ..., policy_digest: _Optional[str] = ...) -> None: ...

class TakenUpRequest(_message.Message):
    __slots__ = ("watcher", "policy_version")
    WATCHER_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    watcher: str
    policy_version: int
    def __init__(self, watcher: _Optional[str] = ..., policy_version: _Optional[int] = ...) -> None: ...

class TakenUpResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrafficPolicy(_message.Message):
    __slots__ = ("version", "stable", "candidates", "versions", "identity")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STABLE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    version: int
    stable: ExpertSet
    candidates: _containers.RepeatedCompositeFieldContainer[CandidateTraffic]
    versions: _containers.ScalarMap[str, str]
    identity: str
    def __init__(self, version: _Optional[int] = ..., stable: _Optional[_Union[ExpertSet, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[CandidateTraffic, _Mapping]]] = ..., versions: _Optional[_Mapping[str, str]] = ..., identity: _Optional[str] = ...) -> None: ...

class CandidateTraffic(_message.Message):
    __slots__ = ("organ", "digest", "rollout_id", "mode", "percent")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    organ: str
    digest: str
    rollout_id: str
    mode: str
    percent: float
    def __init__(self, organ: _Optional[str] = ..., digest: _Optional[str] = ..., rollout_id: _Optional[str] = ..., mode: _Optional[str] = ..., percent: _Optional[float] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("router", "observations", "shadows")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    SHADOWS_FIELD_NUMBER: _ClassVar[int]
    router: str
    observations: _containers.RepeatedCompositeFieldContainer[Observation]
    shadows: _containers.RepeatedCompositeFieldContainer[ShadowObservation]
    def __init__(self, router: _Optional[str] = ..., observations: _Optional[_Iterable[_Union[Observation, _Mapping]]] = ..., shadows: _Optional[_Iterable[_Union[ShadowObservation, _Mapping]]] = ...) -> None: ...

class Observation(_message.Message):
    __slots__ = ("organ", "digest", "requests", "errors", "nonfinite", "tokens", "seconds_per_token")
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    organ: str
    digest: str
    requests: int
    errors: int
    nonfinite: int
    tokens: int
    seconds_per_token: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, organ: _Optional[str] = ..., digest: _Optional[str] = ..., requests: _Optional[int] = ..., errors: _Optional[int] = ..., nonfinite: _Optional[int] = ..., tokens: _Optional[int] = ..., seconds_per_token: _Optional[_Iterable[float]] = ...) -> None: ...

class ShadowObservation(_message.Message):
    __slots__ = ("rollout_id", "tokens", "shared_tokens", "first_divergence", "latency_ratio")
    ROLLOUT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_DIVERGENCE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_RATIO_FIELD_NUMBER: _ClassVar[int]
    rollout_id: str
    tokens: int
    shared_tokens: int
    first_divergence: int
    latency_ratio: float
    def __init__(self, rollout_id: _Optional[str] = ..., tokens: _Optional[int] = ..., shared_tokens: _Optional[int] = ..., first_divergence: _Optional[int] = ..., latency_ratio: _Optional[float] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReplayRequest(_message.Message):
    __slots__ = ("expert_set_id", "organs", "backbone_digest", "versions")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EXPERT_SET_ID_FIELD_NUMBER: _ClassVar[int]
    ORGANS_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    expert_set_id: str
    organs: _containers.RepeatedScalarFieldContainer[str]
    backbone_digest: str
    versions: _containers.ScalarMap[str, str]
    def __init__(self, expert_set_id: _Optional[str] = ..., organs: _Optional[_Iterable[str]] = ..., backbone_digest: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ReplayState(_message.Message):
    __slots__ = ("phase",)
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[ReplayState.Phase]
        PHASE_PREPARING: _ClassVar[ReplayState.Phase]
        PHASE_READY: _ClassVar[ReplayState.Phase]
    PHASE_UNSPECIFIED: ReplayState.Phase
    PHASE_PREPARING: ReplayState.Phase
    PHASE_READY: ReplayState.Phase
    PHASE_FIELD_NUMBER: _ClassVar[int]
    phase: ReplayState.Phase
    def __init__(self, phase: _Optional[_Union[ReplayState.Phase, str]] = ...) -> None: ...

class ReplayedRequest(_message.Message):
    __slots__ = ("expert_set_id",)
    EXPERT_SET_ID_FIELD_NUMBER: _ClassVar[int]
    expert_set_id: str
    def __init__(self, expert_set_id: _Optional[str] = ...) -> None: ...

class ReplayedResponse(_message.Message):
    __slots__ = ("expert_set",)
    EXPERT_SET_FIELD_NUMBER: _ClassVar[int]
    expert_set: ExpertSet
    def __init__(self, expert_set: _Optional[_Union[ExpertSet, _Mapping]] = ...) -> None: ...
