"""Detects that Ray has died or does not answer while the system runs on it.

Ray itself waits a minute for its own store of the cluster's state before it ends this process, and never misses the
process that runs the replicas of this machine.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping

import psutil
import ray

logger = logging.getLogger(__name__)

LOOK_PERIOD_S = 0.3
ASK_PERIOD_S = 3.0
# Much longer than Ray takes on a machine whose cores are all taken.
ANSWER_TIMEOUT_S = 30.0
# The processes without which a local Ray cannot go on.
ESSENTIAL = ("gcs_server", "raylet")


class RayWatch:
    """Monitors Ray's processes, and polls Ray, on its own threads."""

    def __init__(
        self,
        processes: Mapping[psutil.Process, str],
        lost: Callable[[str], None],
    ) -> None:
        """
        Args:
            processes: process → its name, of a local Ray; none of a cluster's.
            lost: called once with what happened, when Ray cannot be used any more.
        """
        self._processes = dict(processes)
        self._lost = lost
        self._questions: list[Callable[[], None]] = []
        self._stopping = threading.Event()
        self._answered_at = time.monotonic()
        self._problem = ""
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("ray-watch", self._look), ("ray-questions", self._ask))
        ]

    def start(self) -> None:
        """Begins; Ray must be initialised."""
        self._answered_at = time.monotonic()
        for thread in self._threads:
            thread.start()

    def also_ask(self, question: Callable[[], None]) -> None:
        """Has something called whenever Ray has answered, on a thread; it may call Ray."""
        self._questions.append(question)

    def stop_asking(self) -> None:
        """Stops calling Ray, and still watches its processes: before Ray is shut down."""
        self._stopping.set()
        self._threads[1].join(ANSWER_TIMEOUT_S)

    def stop(self) -> None:
        self._stopping.set()
        self._processes = {}
        self._threads[0].join()

    def _look(self) -> None:
        while self._processes or not self._stopping.is_set():
            if problem := self._find_problem():
                self._lost(problem)
                return
            time.sleep(LOOK_PERIOD_S)

    def _find_problem(self) -> str:
        for process, name in list(self._processes.items()):
            try:
                ended = not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                ended = True
            if ended:
                return f"Ray's process {process.pid} ({name}) has ended"
        if not self._stopping.is_set() and time.monotonic() - self._answered_at > ASK_PERIOD_S + ANSWER_TIMEOUT_S:
            return f"Ray has not answered for {ANSWER_TIMEOUT_S:.0f} s"
        return self._problem

    def _ask(self) -> None:
        own = ray.get_runtime_context().get_node_id()
        while not self._stopping.wait(ASK_PERIOD_S):
            try:
                nodes = {node["NodeID"]: bool(node["Alive"]) for node in ray.nodes()}
                if not nodes.get(own, False):
                    self._problem = "Ray has given up this machine's node"
                else:
                    for question in self._questions:
                        question()
            except Exception as error:
                logger.warning("Ray cannot be asked: %s", type(error).__name__)
                continue
            self._answered_at = time.monotonic()


def essential_processes() -> dict[psutil.Process, str]:
    """Process → name, of the local Ray that this process has started."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            name = process.name()
        except psutil.NoSuchProcess:
            continue
        if name in ESSENTIAL:
            found[process] = name
    return found
