"""A database of each kind, and a clock that tests move."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from router.rollouts import schema
from router.rollouts.database import Database
from router.rollouts.health import HealthMonitor
from router.rollouts.history import GENESIS
from router.rollouts.operations import RolloutOperations
from router.rollouts.settings import RolloutSettings
from router.rollouts.store import RolloutStore
from tests.router.rollouts.postgres import programs, running_postgres, url_of
from tests.router.rollouts.support import QUICK, Clock, FolderFleet, controller_of, set_of
from tests.router.rollouts.world import TroubledFleet, World

_numbers = itertools.count(1)
MakeUrl = Callable[[], str]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    binaries = programs()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with running_postgres(binaries) as directory:
        yield directory


@pytest.fixture(scope="session")
def shared_url(postgres: str) -> str:
    """One PostgreSQL database for all tests that begin with empty tables: making another takes long."""
    url = create_database(postgres, "shared")
    Database(url).close()
    return url


def create_database(directory: str, name: str) -> str:
    engine = create_engine(_with_driver(url_of(directory, "postgres")), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return url_of(directory, name)


def emptied(url: str) -> str:
    engine = create_engine(_with_driver(url))
    with engine.begin() as connection:
        for table in schema.metadata.sorted_tables:
            connection.execute(text(f"DELETE FROM {table.name}"))
        connection.execute(schema.history_head.insert().values(id=1, count=0, hash=GENESIS))
        connection.execute(schema.deployment.insert().values(id=1, identity="0" * 32, policy_offset=0))
    engine.dispose()
    return url


def _with_driver(url: str) -> str:
    return url.replace("postgresql:", "postgresql+psycopg:")


@pytest.fixture(params=["sqlite", "postgresql"])
def make_empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """Gives the URL of another database without tables each time."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/rollouts-{next(_numbers)}.db"
    directory = request.getfixturevalue("postgres")
    return lambda: create_database(directory, f"rollouts_{next(_numbers)}")


@pytest.fixture(params=["sqlite", "postgresql"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """Gives the URL of a database that nothing is in each time; the one given before must not be in use any more."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/rollouts-{next(_numbers)}.db"
    url = request.getfixturevalue("shared_url")
    return lambda: emptied(url)


@pytest.fixture
def database(make_url: MakeUrl) -> Iterator[Database]:
    database = Database(make_url())
    yield database
    database.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: Database, clock: Clock) -> RolloutStore:
    """Three organs are live."""
    store = RolloutStore(database, clock=clock)
    store.adopt(set_of(breast="a", heart="b", liver="c"), actor="start")
    return store


@pytest.fixture
def world(database: Database, clock: Clock, tmp_path: Path) -> World:
    fleet = TroubledFleet(tmp_path / "fleet")
    keys = {organ: fleet.push(f"{organ} v1") for organ in ("heart", "liver")}
    for organ, key in keys.items():
        for number in (1, 2):
            fleet.add_replica(organ, f"{organ}-{number}", key)
    store = RolloutStore(database, clock=clock)
    members = tuple(
        member.model_copy(update={"bundle_digest": keys[member.organ]}) for member in set_of(heart="", liver="").members
    )
    store.adopt(set_of(heart="").model_copy(update={"members": members}), actor="start")
    monitor = HealthMonitor(clock.monotonic)
    controller = controller_of(store, fleet, monitor=monitor)
    operations = RolloutOperations(store, fleet, QUICK)
    return World(store, fleet, monitor, controller, operations, clock, keys["heart"])


@pytest.fixture
def fleet(tmp_path: Path) -> FolderFleet:
    fleet = FolderFleet(tmp_path / "fleet")
    for organ in ("heart", "lung"):
        fleet.add_replica(organ, f"{organ}-1")
        fleet.add_replica(organ, f"{organ}-2")
    return fleet


@pytest.fixture
def operations(store: RolloutStore, fleet: FolderFleet) -> RolloutOperations:
    return RolloutOperations(store, fleet, RolloutSettings(max_previous=3))


@pytest.fixture
def new(fleet: FolderFleet) -> str:
    return fleet.push("new")
