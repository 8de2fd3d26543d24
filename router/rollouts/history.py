"""The history: append-only, every entry chained to the one before it by SHA-256, so that tampering is found."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from experts.bundles.digest import canonical_json, digest_of
from router.rollouts import schema
from router.rollouts.states import Action

GENESIS = "0" * 64
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Head:
    """The number and hash of the newest entry. Store it elsewhere to verify the history later."""

    count: int
    hash: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One event.

    Attributes:
        sequence: from 1, without gaps.
        at: ISO 8601 in UTC.
        actor: who asked; "controller" for what no one asked for.
        action: an `Action`.
        organ: the organ, or "" where all are meant.
        digest: the bundle, or "".
        rollout_id: the rollout, or "".
        from_state: the rollout's state before, or "".
        to_state: the rollout's state after, or "".
        reason: why, in words.
        details: further numbers and names.
        previous_hash: the previous entry's hash.
        hash: SHA-256 over the canonical JSON of all the other fields.
    """

    sequence: int
    at: str
    actor: str
    action: str
    organ: str
    digest: str
    rollout_id: str
    from_state: str
    to_state: str
    reason: str
    details: Mapping[str, Any]
    previous_hash: str
    hash: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of verifying the chain.

    Attributes:
        head: the newest entry of the chain.
        problem: the first problem and its position; "" if there is none.
    """

    head: Head
    problem: str = ""

    @property
    def intact(self) -> bool:
        """Whether no problem was found."""
        return not self.problem


def append(
    connection: Connection,
    action: Action,
    *,
    now: float,
    actor: str,
    organ: str = "",
    digest: str = "",
    rollout_id: str = "",
    from_state: str = "",
    to_state: str = "",
    reason: str = "",
    details: Mapping[str, Any] | None = None,
) -> int:
    """Adds an entry inside the transaction that makes the change.

    Returns:
        Its sequence number.
    """
    head = head_of(connection)
    fields: dict[str, Any] = {
        "sequence": head.count + 1,
        "at": datetime.fromtimestamp(now, UTC).isoformat(timespec="microseconds"),
        "actor": actor,
        "action": str(action),
        "organ": organ,
        "digest": digest,
        "rollout_id": rollout_id,
        "from_state": from_state,
        "to_state": to_state,
        "reason": reason,
        "details": canonical_json(dict(details or {})).decode(),
        "previous_hash": head.hash,
    }
    fields["hash"] = digest_of(fields)
    connection.execute(insert(schema.history).values(**fields))
    connection.execute(update(schema.history_head).values(count=fields["sequence"], hash=fields["hash"]))
    return head.count + 1


def head_of(connection: Connection) -> Head:
    """The head that the database stores next to the chain; an empty one if its row is missing."""
    row = connection.execute(select(schema.history_head.c["count"], schema.history_head.c.hash)).first()
    return Head(0, GENESIS) if row is None else Head(row[0], row[1])


def hash_at(connection: Connection, sequence: int) -> str | None:
    """The hash of the history at an earlier length; None if it is shorter."""
    head = head_of(connection)
    if head.count == sequence:
        return head.hash
    row = connection.execute(select(schema.history.c.hash).where(schema.history.c.sequence == sequence)).first()
    return GENESIS if sequence == 0 else None if row is None else str(row[0])


def entries(connection: Connection, *, organ: str | None = None, after: int = 0, limit: int = _BATCH) -> list[Entry]:
    """Entries in order, of one organ or of all organs.

    Args:
        connection: a transaction.
        organ: only this organ's.
        after: only entries with a larger sequence number.
        limit: the maximum number of entries.
    """
    query = select(schema.history).where(schema.history.c.sequence > after)
    if organ is not None:
        query = query.where(schema.history.c.organ == organ)
    rows = connection.execute(query.order_by(schema.history.c.sequence).limit(limit))
    return [Entry(**{**row._mapping, "details": json.loads(row.details)}) for row in rows]


def newest(connection: Connection, **fields: str) -> Entry | None:
    """The newest entry with these column values, or None."""
    query = select(schema.history)
    for name, value in fields.items():
        query = query.where(schema.history.c[name] == value)
    row = connection.execute(query.order_by(schema.history.c.sequence.desc()).limit(1)).first()
    return None if row is None else Entry(**{**row._mapping, "details": json.loads(row.details)})


def verify(connection: Connection, noted: Head | None = None) -> Verification:
    """Verifies every entry. Finds changed, removed, inserted and reordered entries, also at the end.

    Args:
        connection: a transaction.
        noted: a head that was stored elsewhere. A chain that was rewritten completely, head included, is found only
            with it.
    """
    head = Head(0, GENESIS)
    noted_seen = noted is None or noted == head
    for row in _rows(connection):
        if problem := _problem_of(row, head):
            return Verification(head, problem)
        head = Head(row.sequence, row.hash)
        noted_seen = noted_seen or head == noted
    stated = head_of(connection)
    if stated != head:
        return Verification(head, _problem_at_end(head, stated))
    if noted is not None and not noted_seen:
        return Verification(
            head, f"entry {noted.count} is not the one that was noted down ({noted.hash[:12]}…): rewritten, or removed"
        )
    return Verification(head)


def _problem_of(row: Row[Any], head: Head) -> str:
    expected = head.count + 1
    if row.sequence < expected:
        return f"entry {row.sequence}: there is no such number in a history; it was put there"
    if row.sequence > expected:
        missing = f"entry {expected}" if row.sequence == expected + 1 else f"entries {expected} to {row.sequence - 1}"
        return f"before entry {row.sequence}: {missing} missing"
    fields = dict(row._mapping)
    stated = fields.pop("hash")
    if digest_of(fields) != stated:
        return f"entry {row.sequence}: it does not have its own hash; a field was changed, or it was put there"
    if row.previous_hash != head.hash:
        return f"entry {row.sequence}: it does not follow entry {head.count}; one of them was replaced or moved"
    return ""


def _problem_at_end(head: Head, stated: Head) -> str:
    if stated.count > head.count:
        return f"after entry {head.count}: there must be {stated.count} entries; the last ones were removed"
    if stated.count < head.count:
        return f"entry {stated.count + 1}: there must be only {stated.count} entries; it was added behind the head"
    return f"entry {head.count}: it is not the one that the head names; it was replaced"


def _rows(connection: Connection) -> Iterator[Row[Any]]:
    last: int | None = None
    while True:
        query = select(schema.history).order_by(schema.history.c.sequence).limit(_BATCH)
        if last is not None:
            query = query.where(schema.history.c.sequence > last)
        rows = connection.execute(query).all()
        if not rows:
            return
        yield from rows
        last = rows[-1].sequence
