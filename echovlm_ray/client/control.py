"""The Python client for operators: `echovlm.v1.ExpertControl`. `echoray experts` uses it, too.

    from echovlm_ray.client.control import ExpertControlClient

    with ExpertControlClient("127.0.0.1:50052") as control:
        control.stage("heart", version="1.1.0", actor="ann", reason="finer valves")
        for state in control.watch():
            print(state.rollouts)

Messages are those of protos/control.proto. Errors are `EchoVLMError`s, as in the other clients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from echovlm_ray.client.arguments import message, text, texts, timeout
from echovlm_ray.client.bundle_upload import open_upload
from echovlm_ray.client.connection import TLS, call_metadata, check_connection, open_channel
from echovlm_ray.client.errors import from_rpc_error
from echovlm_ray.client.replay import ExpertSetReplay
from protos import control_pb2, control_pb2_grpc

DEFAULT_CONTROL = "127.0.0.1:50052"
# The precondition of a change: the state that the caller saw.
Expected = control_pb2.Expected
# Registries and histories can be long, and an answer has all of them.
MAX_ANSWER_BYTES = 256 * 1024 * 1024

Response = TypeVar("Response")


class ChangeOptions(TypedDict, total=False):
    """What every operation takes besides what it is about; see `ExpertControlClient`."""

    reason: str
    dry_run: bool


class ExpectingOptions(ChangeOptions, total=False):
    """What an operation takes on what is there already."""

    # Only if this is the bundle in question.
    digest: str
    expected: Expected | None


class ExpertControlClient:
    """The client of a system's Control. Thread-safe.

    Args:
        address: host:port of Control.
        token: the bearer token, for servers with a token file; never sent unencrypted to another machine.
        tls: for servers with certificates; `TLS()` trusts the machine's authorities.
        timeout_s: the timeout of a call in seconds; a push and a watch have none.

    Raises:
        ValueError: an address, token or certificate is invalid.

    Calls are not retried automatically. All are idempotent and may be repeated.

    Every operation takes `actor` (the operator) and `reason`, both for the history. With `dry_run` it only describes
    the steps. `expected` is a precondition: the operation is refused if the organ's state has changed since the caller
    saw it, for example `Expected(rollout_id="heart-12", state="canary")`. All operations raise:

        NotFoundError: an unknown organ or version; the text lists the existing ones.
        FailedPreconditionError: the rollout is in another state, or the precondition does not hold; the text has the
            last event and the possible actions.
        InvalidRequestError: an argument is invalid.
        UnavailableError: Control does not answer.
    """

    def __init__(
        self,
        address: str = DEFAULT_CONTROL,
        *,
        token: str | None = None,
        tls: TLS | None = None,
        timeout_s: float | None = 30.0,
    ) -> None:
        check_connection(address, token, tls)
        self._timeout_s = timeout("timeout_s", timeout_s)
        self._channel = open_channel(address, tls, ("grpc.max_receive_message_length", MAX_ANSWER_BYTES))
        self._stub = control_pb2_grpc.ExpertControlStub(self._channel)
        self.address = address
        self._token = token

    def push(
        self,
        directory: Path,
        *,
        start: Callable[[int], None] = lambda total: None,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> control_pb2.BundleInfo:
        """Pushes the bundle in a folder to Control's registry. Idempotent.

        Args:
            directory: the bundle's folder.
            start: called with the number of bytes.
            progress: called from another thread with the size of each sent piece.

        Raises:
            InvalidRequestError: the folder is not a bundle.
        """
        upload = open_upload(directory)
        start(upload.size_bytes)
        return self._call(self._stub.Push, control_pb2.PushResponse, upload.messages(progress), limited=False).bundle

    def stage(
        self, organ: str, *, actor: str, version: str = "", digest: str = "", **options: Unpack[ChangeOptions]
    ) -> control_pb2.OperationResponse:
        """Begins a rollout of a bundle, named by its version in the registry or by its digest."""
        fields = {"organ": organ, "actor": actor, "version": version, "digest": digest, **options}
        return self._change(self._stub.Stage, control_pb2.StageRequest, fields)

    def canary(
        self,
        organ: str,
        percent: float,
        *,
        actor: str,
        gates_json: str = "",
        override: bool = False,
        **options: Unpack[ExpectingOptions],
    ) -> control_pb2.OperationResponse:
        """Sends a share of the requests to the candidate.

        With `gates_json`, a JSON array with the format of `gates` in a rollout file, the canary begins automatically
        once the candidate has passed them. `override` ignores gates that were not passed, and needs a reason.
        """
        gates = {"gates_json": gates_json, "override": override}
        fields = {"organ": organ, "percent": percent, "actor": actor, **gates, **options}
        return self._change(self._stub.Canary, control_pb2.TrafficRequest, fields)

    def shadow(
        self, organ: str, percent: float, *, actor: str, **options: Unpack[ExpectingOptions]
    ) -> control_pb2.OperationResponse:
        """Has the candidate compute a part of the requests beside the incumbent; its answers are discarded."""
        fields = {"organ": organ, "percent": percent, "actor": actor, **options}
        return self._change(self._stub.Shadow, control_pb2.TrafficRequest, fields)

    def promote(
        self,
        organ: str,
        *,
        actor: str,
        gates_json: str = "",
        override: bool = False,
        **options: Unpack[ExpectingOptions],
    ) -> control_pb2.OperationResponse:
        """Makes the candidate the organ's version for all new requests. Gates and override are those of `canary`."""
        fields = {"organ": organ, "actor": actor, "gates_json": gates_json, "override": override, **options}
        return self._change(self._stub.Promote, control_pb2.OrganRequest, fields)

    def rollback(self, organ: str, *, actor: str, **options: Unpack[ExpectingOptions]) -> control_pb2.OperationResponse:
        """Ends a candidate's rollout. Never touches the stable version; see `roll_back_stable`.

        Without `digest` or `expected.rollout_id` it applies to any candidate in flight.

        Raises:
            FailedPreconditionError: nothing is in flight, or another candidate; the text has the last event.
        """
        return self._change(self._stub.Rollback, control_pb2.OrganRequest, {"organ": organ, "actor": actor, **options})

    def roll_back_stable(
        self, organ: str, *, actor: str, version: str = "", **options: Unpack[ExpectingOptions]
    ) -> control_pb2.OperationResponse:
        """Rolls back the stable version, given by its version or digest, to the previous one.

        Raises:
            FailedPreconditionError: another version is stable, a candidate is in flight, or there is no previous
                version.
        """
        fields = {"organ": organ, "actor": actor, "version": version, **options}
        return self._change(self._stub.RollBackStable, control_pb2.RollBackStableRequest, fields)

    def retire(
        self, organ: str, *, actor: str, version: str = "", **options: Unpack[ExpectingOptions]
    ) -> control_pb2.OperationResponse:
        """Takes an organ, or one version of it, out of service for good."""
        fields = {"organ": organ, "actor": actor, "version": version, **options}
        return self._change(self._stub.Retire, control_pb2.RetireRequest, fields)

    def apply(self, rollout_json: str, *, actor: str, dry_run: bool = False) -> control_pb2.OperationResponse:
        """Stages what a rollout file says, with its steps; applying it again changes nothing."""
        fields = {"rollout_json": rollout_json, "actor": actor, "dry_run": dry_run}
        return self._change(self._stub.Apply, control_pb2.ApplyRequest, fields)

    def list(self, organ: str = "") -> control_pb2.ListResponse:
        """The live expert set, the rollouts, the replicas, and the registry's bundles, of one organ or of all."""
        return self._call(self._stub.List, control_pb2.ListResponse, message(control_pb2.ListRequest, organ=organ))

    def history(
        self, organ: str = "", *, last: int = 0, verify: bool = False, noted_hash: str = ""
    ) -> control_pb2.HistoryResponse:
        """The history of one organ or of all organs, oldest first.

        Args:
            organ: the organ; empty for all.
            last: the number of newest entries; 0 for all.
            verify: also verify the whole chain of hashes; problems are in `faults`.
            noted_hash: with `verify`, an earlier head that must be in the chain.
        """
        request = message(control_pb2.HistoryRequest, organ=organ, last=last, verify=verify, noted_hash=noted_hash)
        return self._call(self._stub.History, control_pb2.HistoryResponse, request)

    def watch(self) -> Iterator[control_pb2.ControlState]:
        """Yields the state now and after every change, without an end. Deleting the iterator ends the call."""
        request_id, metadata = call_metadata(self._token, None)
        call = self._stub.Watch(control_pb2.WatchRequest(), metadata=metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address, request_id, service="Control") from None
        finally:
            call.cancel()

    def replay(
        self,
        expert_set_id: str,
        *,
        organs: Sequence[str] = (),
        backbone_digest: str = "",
        versions: Mapping[str, str] | None = None,
    ) -> ExpertSetReplay:
        """Loads a past expert set until the `with` block of the returned object ends.

        Args:
            expert_set_id: from the answer's provenance.
            organs: the organs that the answer used; empty for all organs of the set.
            backbone_digest: the answer's backbone; another one is refused.
            versions: bundle digest → version, from the answer; for messages.
        """
        request_id, metadata = call_metadata(self._token, None)
        request = control_pb2.ReplayRequest(
            expert_set_id=text("expert_set_id", expert_set_id),
            organs=texts("organs", organs),
            backbone_digest=text("backbone_digest", backbone_digest),
            versions={
                text("versions", digest): text("versions", version) for digest, version in (versions or {}).items()
            },
        )
        return ExpertSetReplay(self._stub.Replay(request, metadata=metadata), self.address, request_id)

    def close(self) -> None:
        """Closes the connection and cancels running calls."""
        self._channel.close()

    def __enter__(self) -> Self:
        """Returns the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self.close()

    def _change(
        self, method: Callable[..., Any], kind: type[Message], fields: Mapping[str, object]
    ) -> control_pb2.OperationResponse:
        if unknown := sorted(set(fields) - set(kind.DESCRIPTOR.fields_by_name)):
            raise TypeError(f"there is no option {', '.join(unknown)}")
        return self._call(method, control_pb2.OperationResponse, message(kind, **fields))

    def _call(
        self, method: Callable[..., Any], kind: type[Response], request: Any, *, limited: bool = True
    ) -> Response:
        request_id, metadata = call_metadata(self._token, None)
        try:
            response = method(request, timeout=self._timeout_s if limited else None, metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address, request_id, service="Control") from None
        assert isinstance(response, kind)
        return response
