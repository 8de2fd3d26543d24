"""The Ray session to run on: a local one, removed afterwards, or an existing cluster."""

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray
from ray import serve

from echovlm_ray.config import Config
from echovlm_ray.hosts import host_port
from echovlm_ray.serving.cluster.ray_folder import ray_folder
from echovlm_ray.serving.cluster.ray_internals import on_loopback

logger = logging.getLogger(__name__)

NAMESPACE = "echovlm"
# How long the processes of a local Ray may take to end by themselves.
EXIT_GRACE_S = 5.0
PROBE_TIMEOUT_S = 5.0
# What Ray writes down about its own calls, many times a second in every process even when there are no requests. No
# metric of ours comes from it.
IDLE_SAVINGS = {
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "false",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
}


@contextmanager
def local_ray(config: Config) -> Iterator[None]:
    """Starts a local Ray with Serve. All of its processes have ended at the end of the block.

    Its ports accept only calls that carry a token that no other user knows: what arrives at some of them is unpickled.
    """
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        # Ray turns its authentication on for a cluster of its own; without this it would write a token into the home.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray runs its workers below everything else on the machine; these have callers waiting.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Nothing about this machine is reported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in IDLE_SAVINGS.items():
        os.environ.setdefault(name, value)
    with ray_folder() as folder, on_loopback(), _started_in(folder, config):
        yield


@contextmanager
def _started_in(folder: Path, config: Config) -> Iterator[None]:
    own = psutil.Process()
    before = set(own.children(recursive=True))
    started: set[psutil.Process] = set()
    try:
        with _kept_signal_handlers():
            ray.init(
                address="local",
                _temp_dir=str(folder),
                namespace=NAMESPACE,
                include_dashboard=False,
                object_store_memory=config.serve.object_store_bytes,
                _metrics_export_port=config.serve.metrics_port or None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        _start_serve()
        yield
    finally:
        started |= set(own.children(recursive=True)) - before
        ray.shutdown()
        started |= set(own.children(recursive=True)) - before
        end_processes(started, EXIT_GRACE_S)


@contextmanager
def joined_ray(address: str) -> Iterator[None]:
    """Connects to a cluster, and starts Serve there if it does not run. The cluster is not changed otherwise.

    Args:
        address: host:port of the cluster's head, or "auto" for the cluster that this machine belongs to.

    Raises:
        ConnectionError: no cluster answers there.
    """
    _probe(address)
    try:
        with _kept_signal_handlers():
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConnectionError(f"no Ray cluster can be joined at {address}: {lines[0]}") from None
    try:
        _start_serve()
        yield
    finally:
        ray.shutdown()


def metrics_addresses() -> list[str]:
    """host:port of every node's metrics, for Prometheus; of the Ray that this process is connected to."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort", 0) > 0]
    return sorted(host_port(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in nodes)


def _probe(address: str) -> None:
    """Ray itself tries for minutes before it says that nothing answers."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ConnectionError(f'a Ray cluster is named by host:port or "auto", not by {address!r}')
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"no Ray cluster can be joined at {address}: {error}") from None


def end_processes(processes: set[psutil.Process], grace_s: float) -> None:
    """Waits for processes to end, and kills those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            logger.info("killing %s, which did not end by itself", process.name())
            process.kill()
    psutil.wait_procs(alive, timeout=grace_s)


def _start_serve() -> None:
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False})


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Ray puts its own handler for SIGTERM in place, which would end this process without the rest of our clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
