"""Loads past expert sets in addition to the live one, while a caller's replay runs."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from echovlm_ray.errors import DeadlineError, InvalidRequestError, OverloadedError, PartUnavailableError
from echovlm_ray.serving.control.replay_check import ReplayCheck
from echovlm_ray.serving.core.request_checks import check_expert_set_id
from experts.errors import ExpertCapacityError, InvalidBundleError, UnknownBundleError
from protos import control_pb2
from router.errors import ReplayRefusedError, RolloutStateError
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.controller import RolloutController
from router.rollouts.fleet import Fleet, ReplicaLostError
from router.rollouts.leases import Lease, Leases
from router.rollouts.outcome import format_error
from router.rollouts.replica_memory import memory_shortage, missing_bundles
from router.rollouts.settings import RolloutSettings
from router.rollouts.store import RolloutStore

# Concurrent loads.
THREADS = 8
LOOK_PERIOD_S = 0.2
# An unload that began before the lease may end after the load.
MAX_ROUNDS = 5

Result = TypeVar("Result")


class Replays:
    """For Control's event loop. One replay loads at a time; the others wait in order."""

    def __init__(
        self,
        store: RolloutStore,
        fleet: Fleet,
        leases: Leases,
        controller: RolloutController,
        check: ReplayCheck,
        settings: RolloutSettings,
    ) -> None:
        """`controller` unloads bundles without a lease."""
        self._store = store
        self._fleet = fleet
        self._leases = leases
        self._controller = controller
        self._check = check
        self._settings = settings
        self._turn = asyncio.Lock()
        self._count = 0
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="replays")

    def close(self) -> None:
        """Ends the threads. A running load continues, and the next controller unloads the bundle."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def hold(self, request: control_pb2.ReplayRequest) -> AsyncGenerator[control_pb2.ReplayState, None]:
        """Loads a past set until the iterator is closed, or for `max_replay_s`.

        Raises:
            InvalidRequestError: the id or an organ is invalid.
            UnknownExpertSetError: no request of this deployment was ever assigned to the set.
            ReplayRefusedError: one of its bundles is missing, damaged or not admitted.
            RolloutStateError: the backbone differs, or no replica of an organ is running.
            ExpertCapacityError: the replicas' memory does not suffice.
            OverloadedError: too many replays are running or waiting.
            PartUnavailableError: a replica was lost while it loaded.
            DeadlineError: `max_replay_s` has passed.
        """
        limit_s = self._settings.max_replay_s
        deadline = asyncio.get_running_loop().time() + limit_s
        check_expert_set_id(request.expert_set_id)
        with self._counted():
            expert_set = await self._run(self._past_set, request)
            organs = _organs_of(expert_set, request)
            yield control_pb2.ReplayState(phase=control_pb2.ReplayState.PHASE_PREPARING)
            async with self._leased(expert_set, organs, dict(request.versions), deadline):
                yield control_pb2.ReplayState(phase=control_pb2.ReplayState.PHASE_READY)
                await asyncio.sleep(deadline - asyncio.get_running_loop().time())
        raise DeadlineError(
            f"the replay was held for {limit_s:g} s (rollouts.max_replay_s), and has released its experts: begin again"
        )

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        if self._count >= self._settings.max_replays:
            raise OverloadedError(
                f"{self._count} replays are held or wait, and that is the limit (rollouts.max_replays): try again later"
            )
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    @contextlib.asynccontextmanager
    async def _leased(
        self, expert_set: ExpertSet, organs: tuple[str, ...], versions: dict[str, str], deadline: float
    ) -> AsyncIterator[None]:
        stack = contextlib.AsyncExitStack()
        waits_for: list[str] = []
        try:
            async with asyncio.timeout_at(deadline):
                await self._take(stack, expert_set, organs, versions, waits_for)
        except TimeoutError:
            await stack.aclose()
            if waits_for:
                raise ExpertCapacityError(f"no room came free in time: {waits_for[-1]}") from None
            limit_s = self._settings.max_replay_s
            raise DeadlineError(f"the set was not loaded within {limit_s:g} s (rollouts.max_replay_s)") from None
        except BaseException:
            await stack.aclose()
            raise
        async with stack:
            yield

    async def _take(
        self,
        stack: contextlib.AsyncExitStack,
        expert_set: ExpertSet,
        organs: tuple[str, ...],
        versions: dict[str, str],
        waits_for: list[str],
    ) -> None:
        """Pushes a ready lease on the exit stack: immediately if nothing must be loaded, otherwise in its turn."""
        serving = {live.stable_digest for live in (await self._run(self._store.snapshot)).organs}
        await self._run(self._check.check, expert_set, organs, serving, versions)
        lease = self._lease(stack, expert_set, organs)
        if not await self._not_held(lease):
            lease.ready = True
            return
        await stack.aclose()
        async with self._turn:
            await self._wait_for_room(expert_set, organs, waits_for)
            lease = self._lease(stack, expert_set, organs)
            await self._load(lease, versions)
            lease.ready = True

    def _lease(self, stack: contextlib.AsyncExitStack, expert_set: ExpertSet, organs: tuple[str, ...]) -> Lease:
        lease = self._leases.take(expert_set, organs)

        def release() -> None:
            self._leases.release(lease)
            self._controller.wake()

        stack.callback(release)
        return lease

    async def _not_held(self, lease: Lease) -> list[tuple[str, ExpertSetMember]]:
        """(replica, member) of bundles that are not loaded, or are being unloaded."""
        for organ in (member.organ for member in lease.members):
            if not self._fleet.replicas(organ):
                raise RolloutStateError(f"no replica of {organ!r} is running, so its experts cannot compute")
        missing = await self._run(missing_bundles, self._fleet, lease.members)
        going = self._controller.unloading()
        leaving = [
            (replica, member)
            for member in lease.members
            for replica in self._fleet.replicas(member.organ)
            if (replica, member.bundle_digest) in going
        ]
        return list(dict.fromkeys([*missing, *leaving]))

    async def _wait_for_room(self, expert_set: ExpertSet, organs: tuple[str, ...], waits_for: list[str]) -> None:
        members = tuple(member for member in expert_set.members if member.organ in organs)

        def look() -> str:
            missing = missing_bundles(self._fleet, members)
            return memory_shortage(self._fleet, self._store.snapshot(), missing)

        while reason := await self._run(look):
            waits_for.append(reason)
            del waits_for[:-1]
            # The controller unloads released bundles about once a second.
            self._controller.wake()
            await asyncio.sleep(LOOK_PERIOD_S)
        waits_for.clear()

    async def _load(self, lease: Lease, versions: dict[str, str]) -> None:
        for _ in range(MAX_ROUNDS):
            missing = await self._not_held(lease)
            if not missing:
                return
            going = self._controller.unloading()
            if any((replica, member.bundle_digest) in going for replica, member in missing):
                await asyncio.sleep(LOOK_PERIOD_S)
                continue
            loads = [self._run(self._load_one, replica, member, versions) for replica, member in missing]
            await asyncio.gather(*loads)
        raise PartUnavailableError("a replica of the set", "it does not keep what it loads")

    def _load_one(self, replica: str, member: ExpertSetMember, versions: dict[str, str]) -> None:
        digest = member.bundle_digest
        try:
            self._fleet.load(replica, member.organ, digest, self._settings.max_replay_s)
        except (InvalidBundleError, UnknownBundleError) as error:
            version = versions.get(digest, "") or f"{digest[:12]}…"
            reason = f"cannot be loaded any more: {format_error(error)}"
            raise ReplayRefusedError(member.organ, version, reason) from None
        except TimeoutError as error:
            raise DeadlineError(f"{member.organ}: {format_error(error)} (rollouts.max_replay_s)") from None

    def _past_set(self, request: control_pb2.ReplayRequest) -> ExpertSet:
        snapshot = self._store.snapshot()
        asked = request.backbone_digest
        if asked and asked != snapshot.backbone_digest:
            raise RolloutStateError(
                f"the answer was made with the backbone {asked[:12]}…, and this system serves "
                f"{snapshot.backbone_digest[:12]}…: serve the checkpoint that gave the answer"
            )
        return self._store.expert_set(request.expert_set_id)

    async def _run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """Runs a blocking call. A lost replica becomes `PartUnavailableError`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)
        except ReplicaLostError as error:
            raise PartUnavailableError("a replica of the experts", format_error(error)) from None


def _organs_of(expert_set: ExpertSet, request: control_pb2.ReplayRequest) -> tuple[str, ...]:
    """The organs whose experts are loaded: those of the caller, and all organs of a flat set."""
    unknown = sorted(set(request.organs) - set(expert_set.organs))
    if unknown:
        raise InvalidRequestError(
            "organs", f"{unknown[0][:64]!r} is not in the expert set, which has {', '.join(expert_set.organs)}"
        )
    if expert_set.routing == "flat" or not request.organs:
        return expert_set.organs
    return tuple(organ for organ in expert_set.organs if organ in set(request.organs))
