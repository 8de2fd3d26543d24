"""The swaps of `benchmarks.swaps`: versions of one organ's experts, and the ways from one to the next."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import torch

from echovlm_ray.client import EchoVLMError
from echovlm_ray.client.control import ExpertControlClient
from experts.bundles.bundle import Bundle, file_sha256
from experts.bundles.manifest import BundleDescription
from experts.bundles.writer import write_bundle
from protos import control_pb2, router_pb2, router_pb2_grpc, status_pb2, status_pb2_grpc

ACTOR = "benchmark"
TIMEOUT_S = 180.0
# Between two questions to the router about what it would do.
ASK_AGAIN_S = 0.005
# Between two polls of the replica's resident bundles.
LOOK_AGAIN_S = 0.25
CANARY_S = 1.0
MOST_SESSIONS = 64
# Versions differ by this factor in every weight of their experts.
STEP = 1.2


class SwapFailedError(RuntimeError):
    """A swap did not complete; the text gives its state."""


@dataclass(slots=True)
class Swap:
    """One replacement. StateTimers are those of the monotonic clock.

    Attributes:
        kind: how; see `Swapper.KINDS`.
        began: when it was requested.
        ended: when only the new live version was resident.
        phases: "verify", "load", "canary" and "switch" → beginning and end, as far as there were any.
        decided: when `promote`, or the `rollback` of a stable version, was sent. None where a candidate was taken back.
        returned: when that command returned.
        replaced: the version that was live before.
        served_s: from `decided` to the moment when the router was asked and gave a new request to the new version.
        prepared: whether the new version was resident when it was decided.
    """

    kind: str
    began: float
    ended: float = 0.0
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    decided: float | None = None
    returned: float | None = None
    replaced: str = ""
    served_s: float | None = None
    prepared: bool = True


def write_version(directory: Path, source: Bundle, version: str, number: int) -> None:
    """Writes a bundle with other experts than the source's; number 0 gives the same weights."""
    # With a probe, as what `echoray experts pack` makes.
    content = source.manifest.model_dump(exclude={"format", "files"})
    description = BundleDescription.model_validate({**content, "version": version})

    def tensor(name: str) -> torch.Tensor:
        found = source.tensor(name)
        return found * STEP**number if "experts" in name else found

    write_bundle(directory, description, tensor)


def seconds_to_read(source: Bundle) -> float:
    """How long it takes to read a bundle's files once and compute their SHA-256, with warm file caches."""
    began = time.perf_counter()
    for path in source.locations.values():
        file_sha256(path)
    return time.perf_counter() - began


class ControlWatch(AbstractContextManager["ControlWatch"]):
    """Control's state of one organ, from the stream of its states, without polling."""

    def __init__(self, control: ExpertControlClient, organ: str) -> None:
        """Listens for as long as the block lasts."""
        self._control = control
        self._organ = organ
        self._state = control_pb2.ControlState()
        self._changed = threading.Condition()
        # Rollout and state → when it was in that state first.
        self._since: dict[tuple[str, str], float] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="control-watch", daemon=True)

    @property
    def live(self) -> str:
        """The digest that is live now."""
        members = self._state.live.members
        return next(member.bundle_digest for member in members if member.organ == self._organ)

    @property
    def rollout(self) -> control_pb2.Rollout | None:
        """The organ's newest rollout."""
        found = [rollout for rollout in self._state.rollouts if rollout.organ == self._organ]
        return max(found, key=lambda rollout: rollout.created_at, default=None)

    def since(self, rollout_id: str, state: str) -> float | None:
        """When a rollout was first in a state, on the monotonic clock."""
        return self._since.get((rollout_id, state))

    def wait(self, look: Callable[[], bool], what: str) -> float:
        """Waits for a condition and returns the time.

        Raises:
            SwapFailedError: it does not come to pass.
        """
        with self._changed:
            if not self._changed.wait_for(look, TIMEOUT_S):
                raise SwapFailedError(f"not within {TIMEOUT_S:g} s: {what}")
            return time.monotonic()

    def _run(self) -> None:
        while not self._stopping:
            try:
                for state in self._control.watch():
                    self._take(state)
                    if self._stopping:
                        return
            except EchoVLMError:
                time.sleep(0.5)

    def _take(self, state: control_pb2.ControlState) -> None:
        # What happened before the stream said so; the wall clock is the same machine's.
        behind = time.time() - time.monotonic()
        with self._changed:
            self._state = state
            for rollout in state.rollouts:
                self._since.setdefault((rollout.id, rollout.state), rollout.state_since - behind)
            self._changed.notify_all()

    def __enter__(self) -> Self:
        """Waits for the first state."""
        self._thread.start()
        self.wait(lambda: bool(self._state.live.members), "Control says what is live")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops listening; the thread ends with the next state, or with the client."""
        self._stopping = True


class ExpertsView(AbstractContextManager["ExpertsView"]):
    """The resident bundles of an organ's replica, from the replica itself: Control would query every replica and the
    registry.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        """Takes the channel to the replica, and closes it in the end."""
        self._channel = channel
        self._stub = status_pb2_grpc.ReplicaStatusStub(self._channel)

    def wait_until_alone(self, digest: str) -> float:
        """Waits until only this bundle is resident, and returns the time.

        Raises:
            SwapFailedError: that does not come to pass.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            found = self._stub.Describe(status_pb2.DescribeRequest(), timeout=TIMEOUT_S)
            if [bundle.digest for bundle in found.bundles] == [digest]:
                return time.monotonic()
            time.sleep(LOOK_AGAIN_S)
        raise SwapFailedError(f"not within {TIMEOUT_S:g} s: the replica holds what is live, and nothing else")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self._channel.close()


class RouterView(AbstractContextManager["RouterView"]):
    """What the router would do with a new request for an organ. Asking computes nothing, so it is no load."""

    def __init__(self, channel: grpc.Channel, organ: str) -> None:
        """Takes the channel to the router, and closes it in the end."""
        self._channel = channel
        self._stub = router_pb2_grpc.RouterStub(self._channel)
        self._hints = router_pb2.OrganHints(organs=[organ])

    def expert_set(self, session_key: str = "") -> str:
        """The id of the expert set that a request of this moment gets."""
        request = router_pb2.RouteRequest(organ_hints=self._hints, session_key=session_key)
        response: router_pb2.RouteResponse = self._stub.Route(request, timeout=TIMEOUT_S)
        return response.expert_set_id

    def session_of(self, expert_set_id: str) -> str:
        """The key of a session that is assigned an expert set, though others may get a candidate's.

        Raises:
            SwapFailedError: there is none.
        """
        for number in range(MOST_SESSIONS):
            if self.expert_set(key := f"session {number}") == expert_set_id:
                return key
        raise SwapFailedError(f"of {MOST_SESSIONS} sessions none gets the expert set {expert_set_id[:12]}…")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self._channel.close()


class Swapper:
    """Replaces one organ's experts, one way after another."""

    KINDS = ("promote", "roll back", "canary, promote", "canary, roll back")

    def __init__(
        self,
        router: RouterView,
        experts: ExpertsView,
        control: ExpertControlClient,
        watch: ControlWatch,
        organ: str,
        versions: dict[str, str],
    ) -> None:
        self._router = router
        self._experts = experts
        self._control = control
        self._watch = watch
        self._organ = organ
        self._versions = versions
        self._turn = 0

    def next(self) -> Swap:
        """The next swap, whole.

        Raises:
            SwapFailedError: it does not go through.
        """
        kind = self.KINDS[self._turn % len(self.KINDS)]
        self._turn += 1
        live, live_set = self._watch.live, self._router.expert_set()
        swap = Swap(kind, time.monotonic(), prepared=kind != "roll back")
        swap.replaced = next(version for version, digest in self._versions.items() if digest == live)
        digest = ""
        if swap.prepared:
            digest = self._candidate(live)
            self._stage(digest, swap)
            if kind.startswith("canary"):
                began = time.monotonic()
                self._control.canary(self._organ, 50, digest=digest, actor=ACTOR)
                time.sleep(CANARY_S)
                swap.phases["canary"] = (began, time.monotonic())
        switching = time.monotonic()
        if kind == "canary, roll back":
            self._control.rollback(self._organ, digest=digest, actor=ACTOR)
            self._watch.wait(lambda: self._is(digest, "rolled_back"), "the candidate is rolled back")
        else:
            session = self._router.session_of(live_set)
            swap.decided = switching = time.monotonic()
            if swap.prepared:
                self._control.promote(self._organ, digest=digest, actor=ACTOR)
            else:
                self._control.roll_back_stable(self._organ, digest=live, actor=ACTOR)
            swap.returned = time.monotonic()
            self._ask_until_served(session, live_set, swap)
            self._watch.wait(lambda: self._watch.live != live, "another version is live")
        swap.ended = self._experts.wait_until_alone(self._watch.live)
        swap.phases["switch"] = (switching, swap.ended)
        if not swap.prepared:
            self._note_preparation(swap)
        return swap

    def serve(self, version: str) -> None:
        """Makes a version the live one, if it is not, and waits until only it is resident."""
        digest = self._versions[version]
        if self._watch.live != digest:
            self._stage(digest, Swap("", time.monotonic()))
            self._control.promote(self._organ, digest=digest, actor=ACTOR)
            self._watch.wait(lambda: self._watch.live == digest, f"{version} is live")
        self._experts.wait_until_alone(self._watch.live)

    def _candidate(self, live: str) -> str:
        others = [digest for digest in self._versions.values() if digest != live]
        return others[self._turn % len(others)]

    def _is(self, digest: str, *states: str) -> bool:
        rollout = self._watch.rollout
        return rollout is not None and rollout.digest == digest and rollout.state in states

    def _stage(self, digest: str, swap: Swap) -> None:
        before = self._watch.rollout
        self._control.stage(self._organ, digest=digest, actor=ACTOR)

        def warm() -> bool:
            rollout = self._watch.rollout
            if rollout is None or (before is not None and rollout.id == before.id):
                return False
            if rollout.state in ("failed", "rolled_back"):
                raise SwapFailedError(f"{self._organ} {rollout.version} is {rollout.state}: {rollout.reason}")
            return rollout.state == "warm" and rollout.digest == digest

        self._watch.wait(warm, "the candidate is warm")
        self._note_preparation(swap)

    def _note_preparation(self, swap: Swap) -> None:
        rollout = self._watch.rollout
        assert rollout is not None
        verified = self._watch.since(rollout.id, "verified")
        warm = self._watch.since(rollout.id, "warm")
        if verified is not None and warm is not None:
            swap.phases["verify"] = (swap.began, verified)
            swap.phases["load"] = (verified, warm)

    def _ask_until_served(self, session: str, before: str, swap: Swap) -> None:
        assert swap.decided is not None
        deadline = time.monotonic() + TIMEOUT_S
        while (asked := time.monotonic()) < deadline:
            if self._router.expert_set(session) != before:
                swap.served_s = asked - swap.decided
                return
            # A version that is not resident yet takes longer.
            time.sleep(ASK_AGAIN_S if swap.prepared else 10 * ASK_AGAIN_S)
        raise SwapFailedError(f"no request went to the new version within {TIMEOUT_S:g} s")
