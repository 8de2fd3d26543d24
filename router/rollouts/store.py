"""The state of all rollouts: read it, change it, and subscribe to its changes."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from router.errors import RolloutStateError
from router.gating.expert_set import ExpertSet
from router.rollouts import history, past_sets, shadow_reports
from router.rollouts.database import Database
from router.rollouts.history import Entry, Head, Verification
from router.rollouts.records import Rollout, Snapshot
from router.rollouts.shadow import ShadowRecord, ShadowReport
from router.rollouts.traffic import TrafficPolicy
from router.rollouts.transaction import Transaction

Clock = Callable[[], float]


class RolloutStore:
    """Access to the database of rollouts. The only state of this object is its subscribers."""

    def __init__(self, database: Database, *, clock: Clock = time.time) -> None:
        """`clock` returns seconds since 1970."""
        self.database = database
        self.clock = clock
        self._lock = threading.Lock()
        self._subscribers: list[Callable[[], None]] = []

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A transaction for reading."""
        with self.database.read() as connection:
            yield Transaction(connection, self.clock())

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction that excludes other writers; committed at the end, then the subscribers are called."""
        with self.database.write() as connection:
            transaction = Transaction(connection, self.clock())
            yield transaction
            if transaction.changed:
                _remember_sets(transaction)
        if transaction.changed:
            with self._lock:
                subscribers = list(self._subscribers)
            for subscriber in subscribers:
                subscriber()

    def subscribe(self, subscriber: Callable[[], None], *, first: bool = False) -> Callable[[], None]:
        """Registers a callback for every change. It runs on the thread that made the change, must be quick and must not
        raise.

        Args:
            subscriber: the callback.
            first: call it before the others, because requests wait for its effect.

        Returns:
            A function that ends the subscription.
        """
        with self._lock:
            self._subscribers.insert(0 if first else len(self._subscribers), subscriber)

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers.remove(subscriber)

        return unsubscribe

    def adopt(self, expert_set: ExpertSet, *, actor: str) -> bool:
        """Makes an expert set live if there is no live set yet.

        Returns:
            Whether the set is live now.

        Raises:
            RolloutStateError: the database belongs to another backbone or routing.
        """
        with self.write() as transaction:
            if not transaction.adopted():
                transaction.adopt(expert_set, actor)
                return True
            # A database of a release that did not store expert sets.
            _remember_sets(transaction)
        self.check_belongs_to(expert_set)
        return False

    def check_belongs_to(self, expert_set: ExpertSet) -> None:
        """Checks that a set has the same backbone and routing as the live set.

        Raises:
            RolloutStateError: they differ; the text names both.
        """
        snapshot = self.snapshot()
        ours = (expert_set.backbone_digest, expert_set.routing)
        theirs = (snapshot.backbone_digest, snapshot.routing)
        if ours != theirs:
            raise RolloutStateError(
                f"the rollouts' database {self.database.name} belongs to the backbone {theirs[0][:12]}… with "
                f"{theirs[1]!r} routing, but the checkpoint is {ours[0][:12]}… with {ours[1]!r}: give another database"
            )

    def snapshot(self) -> Snapshot:
        """The state now.

        Raises:
            RolloutStateError: no live set was adopted.
        """
        with self.read() as transaction:
            return transaction.snapshot()

    def expert_set(self, expert_set_id: str) -> ExpertSet:
        """An expert set that requests are or were assigned to.

        Raises:
            UnknownExpertSetError: no request of this deployment was ever assigned to it.
        """
        with self.read() as transaction:
            return past_sets.find(transaction.connection, expert_set_id)

    def policy(self) -> TrafficPolicy:
        """The policy that Routers should apply now.

        Raises:
            RolloutStateError: no live set was adopted.
        """
        return TrafficPolicy.of(self.snapshot())

    def rollouts(self, organ: str | None = None, *, limit: int | None = 100) -> list[Rollout]:
        """Rollouts of one organ or of all organs, the newest first."""
        with self.read() as transaction:
            return transaction.rollouts(organ=organ, limit=limit)

    def rollout(self, rollout_id: str) -> Rollout:
        """One rollout.

        Raises:
            UnknownRolloutError: there is no rollout with this id.
        """
        with self.read() as transaction:
            return transaction.rollout(rollout_id)

    def history(self, organ: str | None = None, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        """History entries after a sequence number in order, of one organ or of all organs."""
        with self.read() as transaction:
            return history.entries(transaction.connection, organ=organ, after=after, limit=limit)

    def head(self) -> Head:
        """The newest entry's number and hash, to be stored elsewhere for a later verification."""
        with self.read() as transaction:
            return history.head_of(transaction.connection)

    def verify_history(self, noted: Head | None = None) -> Verification:
        """Verifies the whole history with `router.rollouts.history.verify`."""
        with self.read() as transaction:
            return history.verify(transaction.connection, noted)

    def record_shadow(self, rollout_id: str, records: Sequence[ShadowRecord]) -> ShadowReport:
        """Adds comparisons to a rollout's report; Routers send them in batches.

        Returns:
            The updated report.

        Raises:
            UnknownRolloutError: there is no such rollout.
        """
        with self.write() as transaction:
            transaction.rollout(rollout_id)
            return shadow_reports.add_records(transaction.connection, rollout_id, records, transaction.now)

    def shadow_report(self, rollout_id: str) -> ShadowReport:
        """How far a rollout's shadow agrees with the incumbent.

        Raises:
            UnknownRolloutError: there is no such rollout.
        """
        with self.read() as transaction:
            transaction.rollout(rollout_id)
            return shadow_reports.report_of(transaction.connection, rollout_id)


def _remember_sets(transaction: Transaction) -> None:
    if transaction.adopted():
        past_sets.record(transaction.connection, TrafficPolicy.of(transaction.snapshot()), transaction.now)
