import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, text

from experts.bundles.digest import digest_of
from router.rollouts import history
from router.rollouts.history import GENESIS, Head, Verification
from router.rollouts.states import Action
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import digest

COUNT = 8


@pytest.fixture
def filled(store: RolloutStore) -> RolloutStore:
    """Entry 1 adopts; entries 2 to 8 follow."""
    with store.write() as transaction:
        for number in range(COUNT - 1):
            history.append(
                transaction.connection,
                Action.STAGE,
                now=store.clock() + number,
                actor="Dr. Ünal",
                organ="heart",
                digest=digest(str(number)),
                reason="新的 version",
                details={"percent": 12.5, "steps": [1, 2.5, None]},
            )
    return store


def test_entries_are_numbered_and_chained(filled: RolloutStore) -> None:
    entries = filled.history()
    assert [entry.sequence for entry in entries] == list(range(1, COUNT + 1))
    assert [entry.previous_hash for entry in entries] == [GENESIS, *[entry.hash for entry in entries[:-1]]]
    assert entries[1].details == {"percent": 12.5, "steps": [1, 2.5, None]}
    assert entries[1].at == "2023-11-14T22:13:20.000000+00:00"
    assert filled.verify_history().head == filled.head() == Head(COUNT, entries[-1].hash)
    assert filled.verify_history().intact


def test_entries_are_read_in_pages_and_by_organ(filled: RolloutStore) -> None:
    assert [entry.sequence for entry in filled.history(after=3, limit=2)] == [4, 5]
    assert [entry.sequence for entry in filled.history("heart")] == list(range(2, COUNT + 1))
    assert filled.history("liver") == []


def swap(connection: Connection) -> None:
    connection.execute(text("UPDATE history SET sequence = 99 WHERE sequence = 3"))
    connection.execute(text("UPDATE history SET sequence = 3 WHERE sequence = 4"))
    connection.execute(text("UPDATE history SET sequence = 4 WHERE sequence = 99"))


def swap_with_sequence_rehashed(connection: Connection) -> None:
    """As `swap`, with the hashes made again."""
    swap(connection)
    for sequence in (3, 4):
        rehash(connection, sequence)


def rehash(connection: Connection, sequence: int) -> None:
    row = connection.execute(text(f"SELECT * FROM history WHERE sequence = {sequence}")).one()
    fields = {name: value for name, value in row._mapping.items() if name != "hash"}
    connection.execute(
        text("UPDATE history SET hash = :hash WHERE sequence = :sequence"),
        {"hash": digest_of(fields), "sequence": sequence},
    )


def change_and_rehash(connection: Connection) -> None:
    connection.execute(text("UPDATE history SET actor = 'nobody' WHERE sequence = 3"))
    rehash(connection, 3)


def change_the_last_and_rehash(connection: Connection) -> None:
    connection.execute(text(f"UPDATE history SET actor = 'nobody' WHERE sequence = {COUNT}"))
    rehash(connection, COUNT)


def insert_between(connection: Connection) -> None:
    connection.execute(text("UPDATE history SET sequence = sequence + 100 WHERE sequence > 3"))
    connection.execute(text("UPDATE history SET sequence = sequence - 99 WHERE sequence > 100"))
    copy(connection, 2, 4)
    rehash(connection, 4)


def copy(connection: Connection, source: int, target: int) -> None:
    row = connection.execute(text(f"SELECT * FROM history WHERE sequence = {source}")).one()
    fields = {**row._mapping, "sequence": target}
    columns = ", ".join(fields)
    connection.execute(
        text(f"INSERT INTO history ({columns}) VALUES ({', '.join(f':{name}' for name in fields)})"), fields
    )


def append_behind_the_head(connection: Connection) -> None:
    copy(connection, COUNT, COUNT + 1)
    connection.execute(
        text("UPDATE history SET previous_hash = (SELECT hash FROM history_head) WHERE sequence = :last"),
        {"last": COUNT + 1},
    )
    rehash(connection, COUNT + 1)


def sql(statement: str) -> Callable[[Connection], None]:
    def tamper(connection: Connection) -> None:
        connection.execute(text(statement))

    return tamper


TAMPERING: dict[str, tuple[Callable[[Connection], None], str]] = {
    "removed in the middle": (sql("DELETE FROM history WHERE sequence = 4"), "before entry 5: entry 4 missing"),
    "two removed": (
        sql("DELETE FROM history WHERE sequence IN (4, 5)"),
        "before entry 6: entries 4 to 5 missing",
    ),
    "removed at the start": (sql("DELETE FROM history WHERE sequence = 1"), "before entry 2: entry 1 missing"),
    "removed at the end": (
        sql("DELETE FROM history WHERE sequence >= 7"),
        "after entry 6: there must be 8 entries; the last ones were removed",
    ),
    "all removed": (sql("DELETE FROM history"), "after entry 0: there must be 8 entries"),
    "reordered": (swap, "entry 3: it does not have its own hash"),
    "reordered and rehashed": (swap_with_sequence_rehashed, "entry 3: it does not follow entry 2"),
    "changed and rehashed": (change_and_rehash, "entry 4: it does not follow entry 3"),
    "last changed and rehashed": (change_the_last_and_rehash, "entry 8: it is not the one that the head names"),
    "inserted": (insert_between, "entry 4: it does not follow entry 3"),
    "inserted before the first": (lambda connection: copy(connection, 1, 0), "entry 0: there is no such number"),
    "appended": (append_behind_the_head, "entry 9: there must be only 8 entries"),
    "head removed": (sql("DELETE FROM history_head"), "entry 1: there must be only 0 entries"),
}


@contextmanager
def tampered(store: RolloutStore, tamper: Callable[[Connection], None]) -> Iterator[Verification]:
    """What is found of some tampering, which is then undone."""
    with store.database.engine.connect() as connection:
        tamper(connection)
        yield history.verify(connection)
        connection.rollback()


def test_tampering_is_found_and_located(filled: RolloutStore) -> None:
    for name, (tamper, words) in TAMPERING.items():
        with tampered(filled, tamper) as verification:
            assert not verification.intact, name
            assert words in verification.problem, name
    assert filled.verify_history().intact


COLUMNS = {
    "at": "2023-11-14T22:13:20.000001+00:00",
    "actor": "nobody",
    "action": "promote",
    "organ": "liver",
    "digest": digest("other"),
    "rollout_id": "heart-9",
    "from_state": "warm",
    "to_state": "stable",
    "reason": "",
    "details": "{}",
    "previous_hash": digest("other"),
    "hash": digest("other"),
}


def change(connection: Connection, column: str, sequence: int) -> None:
    statement = text(f"UPDATE history SET {column} = :value WHERE sequence = :sequence")
    connection.execute(statement, {"value": COLUMNS[column], "sequence": sequence})


def test_a_changed_field_is_found_where_it_is(filled: RolloutStore) -> None:
    for column, sequence in itertools.product(COLUMNS, (2, 5, COUNT)):
        with tampered(filled, partial(change, column=column, sequence=sequence)) as verification:
            assert verification.problem.startswith(f"entry {sequence}: "), column


def test_every_column_of_the_table_is_covered() -> None:
    from router.rollouts import schema

    assert {*COLUMNS, "sequence"} == set(schema.history.c.keys())


def test_whoever_rewrites_all_of_it_is_found_by_a_head_noted_elsewhere(filled: RolloutStore) -> None:
    noted = filled.head()
    with filled.write() as transaction:
        history.append(transaction.connection, Action.STAGE, now=0, actor="later")
    assert filled.verify_history(noted).intact

    with filled.database.engine.begin() as connection:
        connection.execute(text("UPDATE history SET actor = 'nobody' WHERE sequence = 3"))
        for sequence in range(3, COUNT + 2):
            rehash(connection, sequence)
            new = connection.execute(text(f"SELECT hash FROM history WHERE sequence = {sequence}")).scalar()
            connection.execute(
                text(f"UPDATE history SET previous_hash = :hash WHERE sequence = {sequence + 1}"), {"hash": new}
            )
        connection.execute(text("UPDATE history_head SET hash = :hash"), {"hash": new})
    assert filled.verify_history().intact
    assert "entry 8 is not the one that was noted down" in filled.verify_history(noted).problem


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(actor=st.text(min_size=1, max_size=20).filter(lambda value: "\x00" not in value), number=st.floats(0, 1e9))
def test_whatever_is_written_is_read_back_and_verified(store: RolloutStore, actor: str, number: float) -> None:
    actor = actor.encode("utf-8", "replace").decode()
    with store.write() as transaction:
        sequence = history.append(
            transaction.connection, Action.CANARY, now=number, actor=actor, details={"percent": number, actor: actor}
        )
    (entry,) = store.history(after=sequence - 1)
    assert (entry.actor, entry.details) == (actor, {"percent": number, actor: actor})
    assert store.verify_history().intact
