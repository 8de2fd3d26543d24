"""The callers of `benchmarks.lifecycle`: each loads, calls and unloads bundles, independent of the others.

What one caller loads another may unload, because loads are counted only by Control. So these answers are
legal, and a caller then begins its cycle again: an exchange with a bundle that is not loaded (any more) is refused with
FAILED_PRECONDITION, and a load for which there is no room with RESOURCE_EXHAUSTED. Anything else is a failure, an
output of another bundle than the one that was asked for above all.
"""

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import grpc
import torch
from google.rpc import code_pb2

from experts.transport.codec import tensor_from_proto, tensor_to_proto
from protos import expert_pb2, expert_pb2_grpc

# A call that takes longer hangs; the longest measured is a hundredth of it.
CALL_TIMEOUT_S = 60.0
_LIMIT = {"timeout": CALL_TIMEOUT_S}
# A cycle that is begun again for longer is a livelock.
CYCLE_TIMEOUT_S = 300.0
LONGEST_PAUSE_S = 0.01
# Of the largest output of a layer, as `experts.bundles.probe` allows in float32.
TOLERANCE = 1e-4
EXCHANGES = 2


class HangingError(RuntimeError):
    """A call or a cycle did not end: a deadlock or a livelock."""


@dataclass(frozen=True, slots=True)
class Question:
    """One exchange and what must come back.

    Attributes:
        digest: of the bundle.
        request: without its correlation id.
        expected_TD: what the reference kernel computes.
    """

    digest: str
    request: expert_pb2.ForwardRequest
    expected_TD: torch.Tensor

    @classmethod
    def of(
        cls,
        digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        expected_TD: torch.Tensor,
    ) -> Self:
        """The question as a message."""
        request = expert_pb2.ForwardRequest(
            bundle_digest=digest,
            layer=layer,
            expert_index=tensor_to_proto(expert_index_TK),
            weight=tensor_to_proto(weight_TK),
            hidden_states=tensor_to_proto(x_TD),
        )
        return cls(digest, request, expected_TD)

    def is_answered_by(self, output_TD: torch.Tensor) -> bool:
        """Whether an output is the expected one, up to rounding."""
        allowed = TOLERANCE * self.expected_TD.abs().max()
        return output_TD.shape == self.expected_TD.shape and bool((output_TD - self.expected_TD).abs().max() <= allowed)


@dataclass
class Tally:
    """What all callers together met with. Add under its lock.

    Attributes:
        cycles: completed ones: loaded, answered and unloaded.
        outputs: all of them, each compared with the reference.
        wrong: of these, the ones that are not what the bundle computes.
        refusals: expected ones, by their text.
        failures: everything else that went wrong.
        answers: question's number → its first output as bytes; a later one with other bits counts in `unequal`.
        longest_s: by kind of call.
    """

    cycles: int = 0
    outputs: int = 0
    wrong: int = 0
    unequal: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    answers: dict[int, bytes] = field(default_factory=dict)
    longest_s: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def took(self, kind: str, seconds: float) -> None:
        """Notes how long a call took."""
        with self.lock:
            self.longest_s[kind] = max(seconds, self.longest_s.get(kind, 0.0))


class Caller:
    """One thread's client: a stream for its exchanges, and calls to load and unload."""

    def __init__(self, number: int, address: str, questions: Sequence[Question], tally: Tally) -> None:
        """Connects. `questions` are numbered by their place."""
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        )
        self._stub = expert_pb2_grpc.ExpertGroupStub(self._channel)
        self._questions: dict[str, list[tuple[int, Question]]] = {}
        for place, question in enumerate(questions):
            self._questions.setdefault(question.digest, []).append((place, question))
        self._chance = random.Random(number)
        self._tally = tally
        self._correlation_id = 0
        self._sent: queue.SimpleQueue[expert_pb2.ForwardRequest | None] = queue.SimpleQueue()
        self._answers: Iterator[expert_pb2.ForwardResponse] = self._stub.Forward(iter(self._sent.get, None))
        self._arrived: queue.SimpleQueue[expert_pb2.ForwardResponse | grpc.RpcError] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"answers-{number}", daemon=True)
        self._reader.start()

    def cycle(self) -> None:
        """Loads a bundle, calls it, and unloads it.

        Raises:
            HangingError: it does not come to an end.
            grpc.RpcError: a call failed in a way that it must not.
        """
        digest = self._chance.choice(list(self._questions))
        deadline = time.monotonic() + CYCLE_TIMEOUT_S
        while not (self._load(digest) and self._ask(digest)):
            if time.monotonic() > deadline:
                raise HangingError(f"a cycle did not end within {CYCLE_TIMEOUT_S:g} s")
            time.sleep(self._chance.random() * LONGEST_PAUSE_S)
        self.unload(digest)
        with self._tally.lock:
            self._tally.cycles += 1

    def unload(self, digest: str) -> None:
        """Unloads a bundle, loaded or not."""
        self._timed("unload", lambda: self._stub.Unload(expert_pb2.UnloadRequest(bundle_digest=digest), **_LIMIT))

    def status(self) -> expert_pb2.ExpertGroupStatusResponse:
        """The group's status."""
        answer: expert_pb2.ExpertGroupStatusResponse = self._stub.Status(
            expert_pb2.ExpertGroupStatusRequest(), **_LIMIT
        )
        return answer

    def close(self) -> None:
        """Ends the stream and the connection."""
        self._sent.put(None)
        self._channel.close()
        self._reader.join()

    def _load(self, digest: str) -> bool:
        try:
            self._timed("load", lambda: self._stub.Load(expert_pb2.LoadRequest(bundle_digest=digest), **_LIMIT))
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            self._refused("no room for a load")
            return False
        return True

    def _ask(self, digest: str) -> bool:
        """Several concurrent exchanges; whether all were answered with an output."""
        under_way: dict[int, tuple[int, Question]] = {}
        for place, question in self._chance.choices(self._questions[digest], k=EXCHANGES):
            self._correlation_id += 1
            request = expert_pb2.ForwardRequest(correlation_id=self._correlation_id)
            request.MergeFrom(question.request)
            under_way[self._correlation_id] = (place, question)
            self._sent.put(request)
        began = time.monotonic()
        complete = True
        while under_way:
            complete &= self._take(under_way, self._next())
        self._tally.took("exchanges", time.monotonic() - began)
        return complete

    def _take(self, under_way: dict[int, tuple[int, Question]], answer: expert_pb2.ForwardResponse) -> bool:
        place, question = under_way.pop(answer.correlation_id)
        if answer.HasField("error"):
            if answer.error.code != code_pb2.FAILED_PRECONDITION:
                with self._tally.lock:
                    self._tally.failures.append(f"an exchange: {answer.error.message}")
            else:
                self._refused("an exchange with a bundle that is not loaded")
            return False
        output_TD = tensor_from_proto(answer.output, "output")
        right = question.is_answered_by(output_TD)
        octets = answer.output.data
        with self._tally.lock:
            self._tally.outputs += 1
            self._tally.wrong += not right
            self._tally.unequal += self._tally.answers.setdefault(place, octets) != octets
        return True

    def _next(self) -> expert_pb2.ForwardResponse:
        try:
            answer = self._arrived.get(timeout=CALL_TIMEOUT_S)
        except queue.Empty:
            raise HangingError(f"an exchange was not answered within {CALL_TIMEOUT_S:g} s") from None
        if isinstance(answer, grpc.RpcError):
            raise answer
        return answer

    def _read(self) -> None:
        try:
            for answer in self._answers:
                self._arrived.put(answer)
        except grpc.RpcError as error:
            self._arrived.put(error)

    def _timed(self, kind: str, call: Callable[[], object]) -> None:
        began = time.monotonic()
        try:
            call()
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise HangingError(f"{kind} did not end within {CALL_TIMEOUT_S:g} s") from None
            raise
        finally:
            self._tally.took(kind, time.monotonic() - began)

    def _refused(self, why: str) -> None:
        with self._tally.lock:
            self._tally.refusals[why] += 1
