"""Control's service for operators."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
from pydantic import ValidationError

from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.serving.control.catalogue import Catalogue
from echovlm_ray.serving.control.gate_messages import evaluation_to_proto, gates_of
from echovlm_ray.serving.control.messages import bundle_to_proto, entry_to_proto, expected_of, outcome_to_proto
from echovlm_ray.serving.control.policy_propagation import PolicyPropagation
from echovlm_ray.serving.control.push import PushReceiver
from echovlm_ray.serving.control.replays import Replays
from echovlm_ray.serving.control.state import StateReader, StateWatch
from experts.bundles.manifest import Manifest
from experts.errors import RegistryUnavailableError, UnknownBundleError
from protos import control_pb2, control_pb2_grpc
from router.errors import RolloutStateError
from router.rollouts.evaluations import Evaluation, evaluations_of
from router.rollouts.history import Entry
from router.rollouts.operation_checks import check_known
from router.rollouts.operations import RolloutOperations
from router.rollouts.outcome import Outcome
from router.rollouts.rollout_file import RolloutFile
from router.rollouts.store import RolloutStore

# History entries per read.
PAGE = 1000


class ExpertControlService(control_pb2_grpc.ExpertControlServicer):
    """Serves `echovlm.v1.ExpertControl`. Changes are `RolloutOperations`, which run on threads."""

    def __init__(
        self,
        store: RolloutStore,
        operations: RolloutOperations | None,
        catalogue: Catalogue,
        pushes: PushReceiver,
        reader: StateReader,
        watch: StateWatch,
        propagation: PolicyPropagation,
        default_organ: str,
        threads: Executor,
        notices: Callable[[], Sequence[str]] = tuple,
        replays: Replays | None = None,
    ) -> None:
        """
        Args:
            store: the state.
            operations: the operations; None if experts run in the router's process and cannot be replaced.
            catalogue: the bundles of the registry.
            pushes: receives bundles.
            reader: reads the state.
            watch: streams the state.
            propagation: waits until Routers and gateways apply a policy.
            default_organ: the organ of requests without one; it cannot be retired.
            threads: the threads for operations.
            notices: returns notes for operators; may block.
            replays: loads past sets; None if experts cannot be replaced.
        """
        self._store = store
        self._replacing = operations
        self._catalogue = catalogue
        self._pushes = pushes
        self._reader = reader
        self._watch = watch
        self._propagation = propagation
        self._default_organ = default_organ
        self._threads = threads
        self._notices = notices
        self._replays = replays

    async def Push(
        self, request_iterator: AsyncIterator[control_pb2.PushRequest], context: grpc.aio.ServicerContext
    ) -> control_pb2.PushResponse:
        """Receives a bundle."""
        manifest = await self._pushes.receive(request_iterator)
        return control_pb2.PushResponse(bundle=bundle_to_proto(manifest, await asyncio.to_thread(self._in_use)))

    async def Stage(
        self, request: control_pb2.StageRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.OperationResponse:
        """Begins a rollout."""

        def stage() -> Outcome:
            return self._operations.stage(
                request.organ,
                self._digest(request.organ, request.version, request.digest),
                actor=request.actor,
                reason=request.reason,
                dry_run=request.dry_run,
            )

        return await self._answer(stage, dry_run=request.dry_run, changes_policy=False)

    async def Canary(
        self, request: control_pb2.TrafficRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.OperationResponse:
        """Sends a share of the requests to the candidate."""
        return await self._answer(
            partial(self._operations.canary, **_traffic(request), **_gated(request)), dry_run=request.dry_run
        )

    async def Shadow(
        self, request: control_pb2.TrafficRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.OperationResponse:
        """Mirrors a share of the requests to the candidate."""
        return await self._answer(lambda: self._operations.shadow(**_traffic(request)), dry_run=request.dry_run)

    async def Promote(
        self, request: control_pb2.OrganRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.OperationResponse:
        """Makes the candidate stable."""
        return await self._answer(
            partial(self._operations.promote, **_organ(request), **_gated(request)), dry_run=request.dry_run
        )

    async def Rollback(
        self, request: control_pb2.OrganRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.OperationResponse:
        """Rolls back the candidate."""
        return await self._answer(lambda: self._operations.rollback(**_organ(request)), dry_run=request.dry_run)

    async def RollBackStable(
        self, request: control_pb2.RollBackStableRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.OperationResponse:
        """Rolls back the given stable version to the previous one."""

        def roll_back() -> Outcome:
            return self._operations.roll_back_stable(
                request.organ,
                self._served_digest(request.organ, request.version, request.digest),
                actor=request.actor,
                reason=request.reason,
                expected=expected_of(request.expected),
                dry_run=request.dry_run,
            )

        return await self._answer(roll_back, dry_run=request.dry_run)

    async def Retire(
        self, request: control_pb2.RetireRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.OperationResponse:
        """Retires an organ, or one of its versions."""

        def retire() -> Outcome:
            asked: dict[str, Any] = {
                "actor": request.actor,
                "reason": request.reason,
                "expected": expected_of(request.expected),
                "dry_run": request.dry_run,
            }
            if request.version or request.digest:
                digest = self._served_digest(request.organ, request.version, request.digest)
                return self._operations.retire_version(request.organ, digest, **asked)
            if request.organ == self._default_organ:
                raise RolloutStateError(
                    f"{request.organ!r} is model.default_organ, which requests use that name no organ: set another one "
                    "before it is retired"
                )
            return self._operations.retire_organ(request.organ, **asked)

        return await self._answer(retire, dry_run=request.dry_run)

    async def Apply(
        self, request: control_pb2.ApplyRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.OperationResponse:
        """Begins the rollout of a file."""
        try:
            file = RolloutFile.model_validate_json(request.rollout_json)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(["rollout_json", *map(str, first["loc"])])
            raise InvalidRequestError(field, first["msg"].removeprefix("Value error, ")) from None

        def apply() -> Outcome:
            if file.digest is not None:
                self._digest(file.organ, "", file.digest)
            return self._operations.apply(file, self._catalogue.digest_of, actor=request.actor, dry_run=request.dry_run)

        return await self._answer(apply, dry_run=request.dry_run, changes_policy=False)

    async def List(
        self, request: control_pb2.ListRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.ListResponse:
        """The live set, the rollouts, and the registry's bundles, of one organ or of all organs."""
        return await asyncio.to_thread(self._list, request.organ or None)

    async def History(
        self, request: control_pb2.HistoryRequest, context: grpc.aio.ServicerContext
    ) -> control_pb2.HistoryResponse:
        """The history, oldest first."""
        return await asyncio.to_thread(self._history, request)

    async def Watch(
        self, request: control_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.ControlState]:
        """Streams the state now and after every change."""
        async for state in self._watch.watch():
            yield state

    async def Replay(
        self, request: control_pb2.ReplayRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[control_pb2.ReplayState]:
        """Loads a past set while the caller's stream is open."""
        if self._replays is None:
            raise _local_experts()
        async with aclosing(self._replays.hold(request)) as states:
            async for state in states:
                yield state

    @property
    def _operations(self) -> RolloutOperations:
        if self._replacing is None:
            raise _local_experts()
        return self._replacing

    async def _answer(
        self, operation: Callable[[], Outcome], *, dry_run: bool, changes_policy: bool = True
    ) -> control_pb2.OperationResponse:
        """Runs an operation, and answers when all new requests follow it, also if nothing was changed."""

        def call() -> tuple[control_pb2.OperationResponse, int]:
            response = outcome_to_proto(operation(), self._catalogue.version, dry_run=dry_run)
            return response, self._store.head().count

        response, sequence = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        if changes_policy and not dry_run:
            response.not_taken_up.extend(await self._propagation.wait(sequence))
        return response

    def _digest(self, organ: str, version: str, digest: str) -> str:
        """The digest of the requested bundle in the registry."""
        if not version and not digest:
            raise InvalidRequestError("version", "or digest must say which bundle of the organ is meant")
        if version:
            found = self._catalogue.digest_of(organ, version)
            if digest and digest != found:
                raise InvalidRequestError("digest", f"is not that of {organ} {version}, which is {found}")
            return found
        manifest = self._catalogue.manifest(digest)
        if manifest.organ != organ:
            raise InvalidRequestError("digest", f"is of a bundle of {manifest.organ!r}, not of {organ[:64]!r}")
        return digest

    def _served_digest(self, organ: str, version: str, digest: str) -> str:
        """The digest of a current or earlier live bundle, which is known also while the registry is unavailable."""
        try:
            return self._digest(organ, version, digest)
        except (UnknownBundleError, RegistryUnavailableError):
            for manifest in self._served(organ):
                if version in ("", manifest.version) and digest in ("", manifest.digest):
                    return manifest.digest
            raise

    def _served(self, organ: str | None) -> list[Manifest]:
        """The known manifests of current and earlier stable bundles and of candidates."""
        snapshot = self._store.snapshot()
        digests = [
            digest
            for live in snapshot.organs
            if organ in (None, live.organ)
            for digest in (*live.previous, live.stable_digest)
        ]
        digests += [rollout.digest for rollout in snapshot.in_flight if organ in (None, rollout.organ)]
        return self._catalogue.known(dict.fromkeys(digests))

    def _in_use(self) -> set[str]:
        return {live.stable_digest for live in self._store.snapshot().organs}

    def _list(self, organ: str | None) -> control_pb2.ListResponse:
        manifests, registry_problem = self._registered(organ)
        snapshot = self._store.snapshot()
        if organ is not None and not manifests:
            check_known(snapshot, organ)
        state = self._reader.read(organ)
        in_use = self._in_use()
        return control_pb2.ListResponse(
            live=state.live,
            bundles=[bundle_to_proto(manifest, in_use) for manifest in manifests],
            rollouts=state.rollouts,
            replicas=state.replicas,
            problems=state.problems,
            registry_problem=registry_problem,
            notices=self._notices(),
            evaluations=[evaluation_to_proto(found, self._catalogue.version) for found in self._evaluations(organ)],
        )

    def _evaluations(self, organ: str | None) -> list[Evaluation]:
        with self._store.read() as transaction:
            organs = transaction.snapshot().known_organs if organ is None else (organ,)
            return evaluations_of(transaction.connection, organs)

    def _registered(self, organ: str | None) -> tuple[list[Manifest], str]:
        try:
            return self._catalogue.list(organ), ""
        except RegistryUnavailableError as error:
            # Serving does not need the registry, and versions are known from the local copies.
            return self._served(organ), str(error)

    def _check_organ(self, organ: str) -> None:
        """Refuses an unknown organ. The registry is only read for an organ that was never live or staged."""
        snapshot = self._store.snapshot()
        if organ not in snapshot.known_organs and not self._registered(organ)[0]:
            check_known(snapshot, organ)

    def _history(self, request: control_pb2.HistoryRequest) -> control_pb2.HistoryResponse:
        if request.organ:
            self._check_organ(request.organ)
        head = self._store.head()
        entries: list[Entry] = []
        noted = not request.noted_hash
        after = 0 if request.organ or request.noted_hash or not request.last else max(0, head.count - request.last)
        while page := self._store.history(after=after, limit=PAGE):
            after = page[-1].sequence
            noted = noted or any(entry.hash == request.noted_hash for entry in page)
            entries += [entry for entry in page if request.organ in ("", entry.organ)]
            if request.last:
                entries = entries[-request.last :]
        faults = []
        if request.verify and (problem := self._store.verify_history().problem):
            faults.append(problem)
        if not noted:
            faults.append(f"no entry has the hash {request.noted_hash[:64]!r} that was noted: rewritten, or removed")
        return control_pb2.HistoryResponse(
            entries=map(entry_to_proto, entries), length=head.count, head_hash=head.hash, faults=faults
        )


def _local_experts() -> RolloutStateError:
    return RolloutStateError(
        'the experts run in the router\'s own process (router.experts is "local"), where they cannot be replaced: set '
        'it to "remote"'
    )


def _traffic(request: control_pb2.TrafficRequest) -> dict[str, Any]:
    return {**_organ(request), "percent": request.percent}


def _gated(request: control_pb2.OrganRequest | control_pb2.TrafficRequest) -> dict[str, Any]:
    return {"gates": gates_of(request.gates_json), "override": request.override}


def _organ(request: control_pb2.OrganRequest | control_pb2.TrafficRequest) -> dict[str, Any]:
    return {
        "organ": request.organ,
        "digest": request.digest or None,
        "actor": request.actor,
        "reason": request.reason,
        "expected": expected_of(request.expected),
        "dry_run": request.dry_run,
    }
