"""Every port and every file of a running system, as docs/operating.md lists them, looked at with `ss` and `stat`."""

import ipaddress
import os
import re
import shutil
import subprocess
from pathlib import Path

import grpc
import psutil
import pytest

from echovlm_ray.hosts import is_loopback
from echovlm_ray.serving.system_secret import secret_file
from experts.private_folder import runtime_folder
from protos import control_pb2, control_pb2_grpc, expert_pb2, expert_pb2_grpc, router_pb2, router_pb2_grpc
from tests.running_system import RunningSystem

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


def family(system: RunningSystem) -> list[psutil.Process]:
    return [psutil.Process(system.process.pid), *psutil.Process(system.process.pid).children(recursive=True)]


@pytest.mark.skipif(shutil.which("ss") is None, reason="it needs ss")
def test_everything_listens_on_loopback(running_system: RunningSystem) -> None:
    pids = {process.pid for process in family(running_system)}
    found = {}
    for line in subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines():
        owner = re.search(r"pid=(\d+)", line)
        if owner and int(owner[1]) in pids:
            host, _, port = line.split()[3].rpartition(":")
            found[port] = host.strip("[]")
    # The gateway's and Control's, one of each of the eleven parts, and Ray's.
    assert len(found) > 20
    open_to_others = {port: host for port, host in found.items() if host == "*" or not is_loopback(host)}
    assert not open_to_others


def test_no_file_can_be_read_by_another_user(running_system: RunningSystem) -> None:
    rollouts = running_system.checkpoint / "rollouts"
    (logs,) = re.findall(r"logs +(/\S+)", running_system.log.read_text())
    secret = secret_file(running_system.status()["identity"])
    for folder in (runtime_folder(), Path(logs).parents[2]):
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    files = [secret, *(path for path in rollouts.rglob("*") if path.is_file())]
    assert {"rollouts.db", "rollouts.db.policy.json", "rollouts.db.lock"} <= {path.name for path in files}
    open_to_others = [path for path in files if path.stat().st_mode & 0o077]
    assert not open_to_others
    # Ray gives its own folders 0777; the one above them is closed.
    assert not [path for path in Path(logs).rglob("*") if path.is_file() and path.stat().st_mode & 0o077]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_reads_nothing_and_renames_nothing(running_system: RunningSystem) -> None:
    (logs,) = re.findall(r"logs +(/\S+)", running_system.log.read_text())
    secret = secret_file(running_system.status()["identity"])
    for command in (["cat", secret], ["ls", logs], ["mv", Path(logs).parent / "sockets", "/tmp/taken"]):
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
    pids = {replica["pid"] for replica in running_system.replicas("control")}
    inner = [
        f"127.0.0.1:{each.laddr.port}"
        for pid in pids
        for each in psutil.Process(pid).net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and ipaddress.ip_address(each.laddr.ip).version == 4
    ]
    (feed,) = [address for address in inner if address != running_system.control_address]
    codes = []
    with (
        grpc.insecure_channel(router["endpoint"]) as to_router,
        grpc.insecure_channel(experts["endpoint"]) as to_experts,
        grpc.insecure_channel(feed) as to_feed,
    ):
        for call in (
            lambda: next(router_pb2_grpc.RouterStub(to_router).Generate(router_pb2.RouterGenerateRequest(), timeout=9)),
            lambda: expert_pb2_grpc.ExpertGroupStub(to_experts).Unload(expert_pb2.UnloadRequest(), timeout=9),
            lambda: expert_pb2_grpc.ExpertGroupStub(to_experts).Load(expert_pb2.LoadRequest(), timeout=9),
            lambda: control_pb2_grpc.RolloutFeedStub(to_feed).Report(control_pb2.ReportRequest(), timeout=9),
            lambda: next(
                control_pb2_grpc.RolloutFeedStub(to_feed).WatchPolicy(control_pb2.WatchPolicyRequest(), timeout=9)
            ),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            codes.append(refused.value.code())
    assert codes == [grpc.StatusCode.UNAUTHENTICATED] * 5


def test_the_page_lists_them() -> None:
    page = OPERATING.read_text()
    for name in ("secret-<identity>", "rollouts.db", "rollouts.db.policy.json", "rollouts.db.lock", "ray-<pid>"):
        assert f"`{name}`" in page, name
