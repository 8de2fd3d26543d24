"""Runs blocking calls on a thread each, so that one that hangs delays nothing else."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any


class Background:
    """Runs calls under keys, at most one for each key. The threads end with the process, hung or not."""

    def __init__(self, limit: int, on_done: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            limit: at most so many calls at once.
            on_done: called after each, on its thread.
        """
        self._limit = limit
        self._on_done = on_done
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[Any]] = {}
        self._done: dict[Hashable, Future[Any]] = {}

    def start(self, key: Hashable, call: Callable[[], Any]) -> Future[Any] | None:
        """Starts a call; none if its key is running, its outcome was not taken yet, or there is no room."""
        future: Future[Any] = Future()
        with self._lock:
            if key in self._running or key in self._done or len(self._running) >= self._limit:
                return None
            self._running[key] = future
        threading.Thread(target=self._run, args=(key, call, future), name=f"rollout {key}", daemon=True).start()
        return future

    def has_room(self) -> bool:
        """Whether another call can be started; stays so for a caller that alone starts calls."""
        with self._lock:
            return len(self._running) < self._limit

    def running(self) -> frozenset[Hashable]:
        """The keys of the calls under way."""
        with self._lock:
            return frozenset(self._running)

    def take_done(self) -> dict[Hashable, Future[Any]]:
        """The calls that ended since this was asked last."""
        with self._lock:
            done, self._done = self._done, {}
        return done

    def _run(self, key: Hashable, call: Callable[[], Any], future: Future[Any]) -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = call()
        except BaseException as error:  # A call that wants to end the process ends only its thread.
            failure = error
        # Ended for its waiters only once it is among the ended ones.
        with self._lock:
            del self._running[key]
            self._done[key] = future
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)
        self._on_done()
