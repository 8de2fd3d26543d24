"""Every port and every file of a running system, as docs/operating.md lists them, looked at with `ss` and `stat`."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest

from echovlm_ray.hosts import is_loopback
from echovlm_ray.serving.cluster.system_secret import secret_file
from experts.private_folder import private_folder, runtime_folder
from protos import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc, router_pb2, router_pb2_grpc
from tests.running_system import RunningSystem

needs_ss = pytest.mark.skipif(shutil.which("ss") is None, reason="it needs ss")
OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


def family(system: RunningSystem) -> list[psutil.Process]:
    return [psutil.Process(system.process.pid), *psutil.Process(system.process.pid).children(recursive=True)]


def listening(system: RunningSystem) -> list[tuple[int, str, str]]:
    """Process, address and port of all that a system listens on."""
    pids = {process.pid for process in family(system)}
    found = []
    for line in subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines():
        owner = re.search(r"pid=(\d+)", line)
        if owner and int(owner[1]) in pids:
            host, _, port = line.split()[3].rpartition(":")
            found.append((int(owner[1]), host.strip("[]"), port))
    return found


def open_to_others(system: RunningSystem) -> list[tuple[int, str]]:
    """Process and port of what does not listen on loopback."""
    return sorted((pid, port) for pid, host, port in listening(system) if host == "*" or not is_loopback(host))


def pids_of_replicas(system: RunningSystem) -> list[int]:
    applications = system.status()["applications"]
    return sorted(replica["pid"] for application in applications for replica in application["replicas"])


@needs_ss
def test_everything_listens_on_loopback_but_one_port_of_serve_in_each_replica(running_system: RunningSystem) -> None:
    # The gateway's and Control's, one of each of the eleven parts, and Ray's.
    assert len(listening(running_system)) > 20
    # Ray Serve has its replicas listen on all addresses and has no option for it; Ray's token guards that port.
    assert [pid for pid, _ in open_to_others(running_system)] == pids_of_replicas(running_system)


@needs_ss
def test_serve_runs_no_proxy_and_takes_short_messages_alone(running_system: RunningSystem) -> None:
    assert not {"8000", "9000"} & {port for _, _, port in listening(running_system)}
    assert not [process for process in family(running_system) if "Proxy" in " ".join(process.cmdline())]
    before = pids_of_replicas(running_system)
    for _, port in open_to_others(running_system):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            codes = []
            for method in ("HandleRequest", "HandleRequestWithRejection"):
                for message in (bytes(5000), b"\xff" * 100, b""):
                    with pytest.raises(grpc.RpcError) as refused:
                        channel.unary_unary(f"/ray.serve.ASGIService/{method}")(message, timeout=9)
                    codes.append(refused.value.code())
        # Ray Serve parses a message before it asks for the token.
        too_long, malformed, without_token = codes[:3]
        assert too_long == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert malformed in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAUTHENTICATED)
        assert without_token == grpc.StatusCode.UNAUTHENTICATED
    assert pids_of_replicas(running_system) == before


def documented_modes() -> dict[str, int]:
    """Name → mode, of the table of files."""
    _, _, rest = OPERATING.read_text().partition("\n## Files\n")
    table, _, _ = rest.partition("\n## ")
    modes: dict[str, int] = {}
    for row in re.findall(r"^\| (.+?) \| (0\d+) \|", table, re.MULTILINE):
        modes |= {name: int(row[1], 8) for name in re.findall(r"`([^`]+)`", row[0])}
    return modes


def test_every_file_has_the_mode_of_the_page(running_system: RunningSystem) -> None:
    rollouts = running_system.checkpoint / "rollouts"
    (logs,) = re.findall(r"logs +(/\S+)", running_system.log.read_text())
    pid = str(running_system.process.pid)
    found = {
        "/tmp/echoray-<uid>/": private_folder(),
        "ray-<pid>": Path(logs).parents[1],
        "sockets/": private_folder() / "sockets",
        "<pid>.json": runtime_folder() / f"{pid}.json",
        "secret-<identity>": secret_file(running_system.status()["identity"]),
        **{f"{path.name}{'/' if path.is_dir() else ''}": path for path in rollouts.iterdir()},
    }
    (found["*.claim"],) = [path for path in runtime_folder().glob("*.claim") if path.read_text().strip() == pid][:1]
    documented = documented_modes()
    assert {name: oct(path.stat().st_mode & 0o777) for name, path in found.items()} == {
        name: oct(documented[name]) for name in found
    }
    # What may not be there at this moment.
    assert documented.keys() - found.keys() <= {"rollouts.db-wal", "rollouts.db-shm", "rollouts.db.incoming/"}
    # Ray gives its own folders 0777; the one above them is closed.
    inside = [path for folder in (rollouts, Path(logs)) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in inside if path.stat().st_mode & 0o077]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_reads_nothing_and_renames_nothing(running_system: RunningSystem) -> None:
    (logs,) = re.findall(r"logs +(/\S+)", running_system.log.read_text())
    secret = secret_file(running_system.status()["identity"])
    sockets = str(Path(logs).parent / "sockets")
    for command in (["cat", str(secret)], ["ls", logs], ["mv", sockets, "/tmp/taken"]):
        done = subprocess.run(command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True)
        assert done.returncode
        assert "Permission denied" in done.stderr


def test_no_command_line_and_no_log_shows_the_secret(running_system: RunningSystem) -> None:
    text = secret_file(running_system.status()["identity"]).read_text().strip()
    assert len(text) == 64
    assert not [process.pid for process in family(running_system) if text in " ".join(process.cmdline())]
    (logs,) = re.findall(r"logs +(/\S+)", running_system.log.read_text())
    files = [running_system.log, *(path for path in Path(logs).rglob("*") if path.is_file())]
    assert not [path for path in files if text in path.read_text(errors="replace")]


def test_the_parts_serve_no_stranger(running_system: RunningSystem) -> None:
    (router,), (experts,) = running_system.replicas("router"), running_system.replicas("expert-heart")
    (control,) = running_system.replicas("control")
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    own = [line.split()[3] for line in listening if f"pid={control['pid']}," in line]
    # Beside Control's public port there are its feed's, and those of Ray, which serve no such method.
    inner = [f"127.0.0.1:{address.rpartition(':')[2]}" for address in own]
    feeds = [address for address in inner if address != running_system.control_address]
    codes = []
    with (
        grpc.insecure_channel(router["endpoint"]) as to_router,
        grpc.insecure_channel(experts["endpoint"]) as to_experts,
        ExitStack() as stack,
    ):
        to_feeds = [stack.enter_context(grpc.insecure_channel(feed)) for feed in feeds]
        experts_stub = expert_pb2_grpc.ExpertGroupStub(to_experts)
        route = router_pb2_grpc.RouterStub(to_router).Route
        calls: list[Callable[[], object]] = [
            partial(route, router_pb2.RouteRequest(), timeout=9),
            partial(experts_stub.Unload, expert_pb2.UnloadRequest(), timeout=9),
            partial(experts_stub.Load, expert_pb2.LoadRequest(), timeout=9),
        ]
        for feed in to_feeds:
            report = control_pb2_grpc.RolloutFeedStub(feed).Report
            calls.append(partial(report, control_pb2.ReportRequest(), timeout=9))
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            codes.append(refused.value.code())
        # What operators reach has none of the parts' own methods.
        with grpc.insecure_channel(running_system.control_address) as public:
            with pytest.raises(grpc.RpcError) as absent:
                control_pb2_grpc.RolloutFeedStub(public).Report(control_pb2.ReportRequest(), timeout=9)
            assert absent.value.code() == grpc.StatusCode.UNIMPLEMENTED
    # Of Ray's own ports some have no such method.
    assert set(codes) <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
    assert codes.count(grpc.StatusCode.UNAUTHENTICATED) >= 4
