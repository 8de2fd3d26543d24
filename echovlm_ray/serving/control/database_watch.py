"""Detects that the rollouts' database was deleted or replaced while Control runs, and when it can be reopened."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from router.errors import RolloutDatabaseLostError
from router.rollouts.database import Database

logger = logging.getLogger(__name__)

PERIOD_S = 1.0


class DatabaseWatch:
    """Checks the database about every second. For one event loop.

    While the database is lost, Control refuses commands and its health is NOT_SERVING. When a valid database with the
    same identity replaces it, such as a restored backup, Control must be restarted to open it.
    """

    def __init__(self, database: Database, publish: Callable[[bool], Awaitable[None]]) -> None:
        """`on_change` is called with whether the database is available whenever that changes."""
        self._database = database
        self._publish = publish
        self._problem = ""
        self._must_restart = False
        self._task: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str:
        """The problem as text; "" if there is none."""
        return self._problem

    @property
    def must_restart(self) -> bool:
        """Whether there is a new database that only a restarted Control can open."""
        return self._must_restart

    async def start(self) -> None:
        """Starts checking."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self._look()
            except Exception as error:
                # Locked, or the disk does not answer; operations report that.
                logger.warning("the rollouts' database cannot be looked at now: %s", type(error).__name__)

    async def _look(self) -> None:
        problem = ""
        try:
            await asyncio.to_thread(self._database.check)
        except RolloutDatabaseLostError as error:
            problem = str(error)
        if problem and not self._must_restart and await asyncio.to_thread(self._database.can_reopen):
            logger.warning("the rollouts' database is there again, so Control is restarted to open it")
            self._must_restart = True
        if problem == self._problem:
            return
        if problem:
            logger.error("%s", problem)
        self._problem = problem
        await self._publish(not problem)
