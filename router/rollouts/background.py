"""Runs each blocking call on a thread of its own, so that a call that hangs does not delay the others."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any


class Background:
    """Runs at most one call per key. The threads are daemons: a call that hangs does not keep the process alive."""

    def __init__(self, limit: int, on_done: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            limit: how many calls may run at once.
            on_done: called after each call, on that call's thread.
        """
        self._limit = limit
        self._on_done = on_done
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[Any]] = {}
        self._done: dict[Hashable, Future[Any]] = {}

    def start(self, key: Hashable, call: Callable[[], Any]) -> Future[Any] | None:
        """Starts a call. None if the key is running, its result was not taken yet, or the limit is reached."""
        future: Future[Any] = Future()
        with self._lock:
            if key in self._running or key in self._done or len(self._running) >= self._limit:
                return None
            self._running[key] = future
        threading.Thread(target=self._run, args=(key, call, future), name=f"rollout {key}", daemon=True).start()
        return future

    def has_capacity(self) -> bool:
        """Whether another call can be started. The answer stays true if no other thread starts calls."""
        with self._lock:
            return len(self._running) < self._limit

    def running(self) -> frozenset[Hashable]:
        """The keys of the running calls."""
        with self._lock:
            return frozenset(self._running)

    def take_done(self) -> dict[Hashable, Future[Any]]:
        """The calls that have ended since the last call of this method."""
        with self._lock:
            done, self._done = self._done, {}
        return done

    def _run(self, key: Hashable, call: Callable[[], Any], future: Future[Any]) -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = call()
        except BaseException as error:  # SystemExit in a call ends only its thread.
            failure = error
        # Waiters are woken only after the call is in the list of ended ones.
        with self._lock:
            del self._running[key]
            self._done[key] = future
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)
        self._on_done()
