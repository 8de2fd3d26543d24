"""The Prometheus metrics of the system, through Ray's metrics agent.

Labels are organ, version, kind, the system's name, and the names that an operator gave to callers: nothing of a
request or a picture is in them, and nothing that a caller sends. Their number is bounded: of versions, a process tells
at most `MAX_VERSIONS` apart. Where no Ray runs, all of this does nothing.

Ray puts `ray_` before every name, and `_total` behind a counter's.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from echovlm_ray.serving.cluster.system_id import SEPARATOR

if TYPE_CHECKING:
    from protos.expert_pb2 import ResidentBundle

MAX_VERSIONS = 200
# The label of several systems on one cluster; Prometheus has none where it is empty.
SYSTEM = "system"
# The version of whatever comes above that.
OTHER = "other"
# Seconds per token: a tenth of a millisecond to ten seconds.
SECONDS_PER_TOKEN = (0.0001, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

RequestKind = Literal["ok", "error", "nonfinite"]


class RouterMetrics:
    """What a router sees of every organ's versions, and of its cache."""

    def __init__(self) -> None:
        self._versions = _Versions()
        self._requests = _counter(
            "echovlm_requests",
            "Requests that ended and used this version, by how they ended; a shadow's too.",
            ("organ", "version", "kind"),
        )
        self._tokens = _counter("echovlm_tokens", "Tokens made with the help of this version.", ("organ", "version"))
        self._latency = _histogram(
            "echovlm_seconds_per_token",
            "Mean time between the tokens of one request that used this version.",
            SECONDS_PER_TOKEN,
            ("organ", "version"),
        )
        self._prefix_hits = _Total(
            _counter(
                "echovlm_prefix_cache_hits",
                "Prompt tokens that were not computed, because the KV cache still had them.",
                (),
            )
        )
        self._preemptions = _Total(
            _counter("echovlm_preemptions", "Requests that were preempted and computed again.", ())
        )
        self._blocks = _gauge("echovlm_cache_blocks", "Blocks of the KV cache; `kind`: used, kept or free.", ("kind",))

    def request(
        self, organ: str, version: str, *, tokens: int, seconds_per_token: float | None, kind: RequestKind
    ) -> None:
        """Counts what one request says of one organ's version.

        Args:
            organ: the organ.
            version: the version of its experts.
            tokens: that it made.
            seconds_per_token: between them, where it was measured.
            kind: how it ended, as far as this version is to blame.
        """
        labels = {"organ": organ, "version": self._versions.bounded(version)}
        self._requests.inc(1, tags={**labels, "kind": kind})
        if tokens:
            self._tokens.inc(tokens, tags=labels)
        if seconds_per_token is not None:
            self._latency.observe(seconds_per_token, tags=labels)

    def prefix_hits(self, total: int) -> None:
        """Takes the engine's count since its start."""
        self._prefix_hits.reached(total)

    def preemptions(self, total: int) -> None:
        """Takes the engine's count since its start."""
        self._preemptions.reached(total)

    def cache_blocks(self, *, total: int, free: int, kept: int) -> None:
        """Takes how the KV cache stands now.

        Args:
            total: blocks that there are.
            free: that no request holds, the kept ones included.
            kept: of these, the ones that a later prompt may begin with.
        """
        for kind, blocks in (("used", total - free), ("kept", kept), ("free", free - kept)):
            self._blocks.set(blocks, tags={"kind": kind})


class DecodingMetrics:
    """What a gateway's decoder processes do."""

    def __init__(self) -> None:
        self._queue = _gauge("echovlm_decoding_queue", "Image files waiting to be decoded, or being decoded.", ())
        self._files = _counter(
            "echovlm_decoded_files",
            "Image files by how their decoding ended: ok, refused, limit, crash, lost or cancelled. "
            "The last four have each cost a decoder process.",
            ("kind",),
        )
        self._totals: dict[str, _Total] = {}

    def update(self, queue_length: int, outcomes: Mapping[str, int]) -> None:
        """Takes how things stand now, and how many files ended in which way since the start."""
        self._queue.set(queue_length)
        for kind, total in outcomes.items():
            if kind not in self._totals:
                self._totals[kind] = _Total(self._files, {"kind": kind})
            self._totals[kind].reached(total)


class RefusalMetrics:
    """The calls of clients that a server refused."""

    def __init__(self) -> None:
        self._refused = _counter(
            "echovlm_refused_calls",
            "Calls of clients that were refused, by the reason in `kind`; `caller`: by its name in the configuration.",
            ("kind", "caller"),
        )
        self._totals: dict[tuple[str, str], _Total] = {}

    def update(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Takes how many there were since the start, by reason and name; see `serving.grpc.refusals`."""
        for (reason, caller), total in counts.items():
            if (reason, caller) not in self._totals:
                labels = {"kind": reason, "caller": caller}
                self._totals[reason, caller] = _Total(self._refused, labels)
            self._totals[reason, caller].reached(total)


class PartMetrics:
    """What every replica says of itself: its queue, and what it holds."""

    def __init__(self, kind: str, organ: str) -> None:
        """
        Args:
            kind: "gateway", "vision", "router", "control" or "experts".
            organ: of an expert group.
        """
        self._versions = _Versions()
        self._labels = {"organ": organ, "kind": kind}
        self._organ = organ
        self._queue = _gauge("echovlm_queue_length", "Requests or exchanges waiting or under way.", ("organ", "kind"))
        self._resident = _CurrentOnly(
            _gauge("echovlm_resident_bytes", "What a version of an organ's experts occupies.", ("organ", "version"))
        )

    def update(self, queue_length: int, bundles: Iterable["ResidentBundle"]) -> None:
        """Takes how things stand now; what is no longer resident goes to zero."""
        self._queue.set(queue_length, tags=self._labels)
        held: dict[tuple[tuple[str, str], ...], float] = {}
        for bundle in bundles:
            labels = (("organ", self._organ), ("version", self._versions.bounded(bundle.version)))
            held[labels] = held.get(labels, 0.0) + bundle.resident_bytes
        self._resident.set(held)


class ControlMetrics:
    """What Control knows: which version of every organ is live, and where its rollout stands."""

    def __init__(self) -> None:
        self._versions = _Versions()
        labels = ("organ", "version", "kind")
        self._live = _CurrentOnly(_gauge("echovlm_live", "1 for the version that is stable.", labels[:2]))
        self._state = _CurrentOnly(
            _gauge("echovlm_rollout_state", "1 for the state, in `kind`, of an organ's newest rollout.", labels)
        )
        self._percent = _CurrentOnly(
            _gauge("echovlm_rollout_percent", "The part of the requests that a candidate gets; `kind`: how.", labels)
        )

    def update(self, live: Mapping[str, str], rollouts: Iterable[tuple[str, str, str, float]]) -> None:
        """Takes how things stand now; everything that was before goes to zero.

        Args:
            live: organ → stable version.
            rollouts: organ, version, state and percentage of every organ's newest rollout.
        """
        self._live.set({self._labels(organ, version): 1.0 for organ, version in live.items()})
        standing = {self._labels(organ, version, state): percent for organ, version, state, percent in rollouts}
        self._state.set(dict.fromkeys(standing, 1.0))
        self._percent.set({labels: percent for labels, percent in standing.items() if percent})

    def _labels(self, organ: str, version: str, kind: str | None = None) -> tuple[tuple[str, str], ...]:
        labels = (("organ", organ), ("version", self._versions.bounded(version)))
        return labels if kind is None else (*labels, ("kind", kind))


class _Total:
    """A counter that follows a count kept elsewhere."""

    def __init__(self, counter: Any, labels: Mapping[str, str] | None = None) -> None:
        self._counter = counter
        self._labels = labels
        self._seen = 0

    def reached(self, total: int) -> None:
        if total > self._seen:
            self._counter.inc(total - self._seen, tags=self._labels)
            self._seen = total


class _CurrentOnly:
    """A gauge of which only what was set last is not zero: Ray keeps every series that there ever was."""

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge
        self._shown: set[tuple[tuple[str, str], ...]] = set()

    def set(self, values: Mapping[tuple[tuple[str, str], ...], float]) -> None:
        for labels in self._shown - set(values):
            self._gauge.set(0, tags=dict(labels))
        for labels, value in values.items():
            self._gauge.set(value, tags=dict(labels))
        self._shown = set(values)


class _Versions:
    """Labels of a bounded number of versions; all further ones share one label."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def bounded(self, version: str) -> str:
        if version not in self._known:
            if len(self._known) >= MAX_VERSIONS:
                return OTHER
            self._known.add(version)
        return version


class _Nothing:
    """A metric where no Ray runs."""

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Counts nothing."""

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Sets nothing."""

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Observes nothing."""


def _counter(name: str, description: str, labels: tuple[str, ...]) -> Any:
    if not _ray_runs():
        return _Nothing()
    from ray.util.metrics import Counter

    return Counter(name, description, (*labels, SYSTEM)).set_default_tags({SYSTEM: _system()})


def _gauge(name: str, description: str, labels: tuple[str, ...]) -> Any:
    if not _ray_runs():
        return _Nothing()
    from ray.util.metrics import Gauge

    return Gauge(name, description, (*labels, SYSTEM)).set_default_tags({SYSTEM: _system()})


def _histogram(name: str, description: str, boundaries: Iterable[float], labels: tuple[str, ...]) -> Any:
    if not _ray_runs():
        return _Nothing()
    from ray.util.metrics import Histogram

    return Histogram(name, description, list(boundaries), (*labels, SYSTEM)).set_default_tags({SYSTEM: _system()})


def _system() -> str:
    """The name of the system whose replica this process is; "" for one without a name."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        application = serve.get_replica_context().app_name
    except RayServeException:
        return ""
    return application.rpartition(SEPARATOR)[0]


def _ray_runs() -> bool:
    """Whether this process belongs to a Ray; loads nothing."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
