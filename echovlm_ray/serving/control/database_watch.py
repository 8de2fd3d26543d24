"""Detects that the rollouts' database was deleted or replaced while Control runs, and when it can be reopened."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from router.errors import RolloutDatabaseLostError
from router.rollouts.database import Database

logger = logging.getLogger(__name__)

PERIOD_S = 1.0


class DatabaseWatch:
    """Looks about every second. Belongs to one event loop.

    While the database is lost Control refuses commands and says NOT_SERVING. Once a sound database of the same identity
    is in its place, such as a backup that was restored, Control must be restarted to open it.
    """

    def __init__(self, database: Database, publish: Callable[[bool], Awaitable[None]]) -> None:
        """Takes the database, and what is called with whether it is there whenever that changes."""
        self._database = database
        self._publish = publish
        self._problem = ""
        self._must_restart = False
        self._task: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str:
        """What is wrong, in words; "" if nothing is."""
        return self._problem

    @property
    def must_restart(self) -> bool:
        """Whether there is a database again that only a new Control can open."""
        return self._must_restart

    async def start(self) -> None:
        """Begins to look."""
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
                # Locked, or a disk that does not answer: what asks for it says so.
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
