"""What a decoder process has and may do, and that it ends with its gateway."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from echovlm_ray.vision.decoding.pool import DecoderPool
from tests.vision.decoding.pools import FIELD, fork_server_of, is_gone, png, running_pool
from tests.vision.dicom_samples import real
from tests.waiting import until_async

ROOT = Path(__file__).resolve().parent.parent.parent.parent
HEAVY = ("torch", "transformers", "ray", "grpc", "pydantic", "google")
FORK_SERVER = "echovlm_ray.vision.decoding.fork_server"


def family(pool: DecoderPool) -> list[int]:
    """The fork server, and below it, for every decoder, one that watches it and the decoder itself."""
    fork_server = fork_server_of(pool)
    assert FORK_SERVER in fork_server.cmdline()
    return [fork_server.pid, *(process.pid for process in fork_server.children(recursive=True))]


def test_a_decoder_loads_nothing_of_what_serves() -> None:
    code = f"import sys, {FORK_SERVER}; {FORK_SERVER}._decode_samples(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = {name.split(".")[0] for name in loaded.stdout.split()}
    assert "pydicom" in modules
    assert modules.isdisjoint(HEAVY)


async def test_decoders_are_forked_from_one_thread_and_have_one() -> None:
    async with running_pool(processes=2) as pool:
        await pool.decode(real("examples_jpeg2k.dcm"), field=FIELD)
        processes = family(pool)
        assert len(processes) == 5
        assert [psutil.Process(pid).num_threads() for pid in processes] == [1] * 5


async def test_no_secret_and_no_socket_of_the_gateway_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHORAY_TEST_TOKEN", "secret")
    listening = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    os.set_inheritable(listening.sockets[0].fileno(), True)
    async with running_pool() as pool:
        await pool.decode(png(), field=FIELD)
        for pid in family(pool):
            process = psutil.Process(pid)
            assert "ECHORAY_TEST_TOKEN" not in process.environ()
            assert process.net_connections("inet") == []
        # Standard input, output and errors, the latter twice; jobs, and the two memories.
        assert psutil.Process(*pool.process_ids).num_fds() == 7
    listening.close()


async def test_limits_of_the_process_are_in_force() -> None:
    async with running_pool() as pool:
        await pool.decode(png(), field=FIELD)
        (pid,) = pool.process_ids
        assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        assert resource.prlimit(pid, resource.RLIMIT_NPROC) == (0, 0)
        soft, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        used = psutil.Process(pid).memory_info().vms
        assert used < soft == hard < used + 2**31 + 2**28
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"


async def test_closing_ends_all_processes() -> None:
    async with running_pool(processes=2) as pool:
        processes = family(pool)
    await until_async(lambda: all(map(is_gone, processes)))


GATEWAY = """
import asyncio, os, signal, time
from tests.vision.decoding.pools import FIELD, png, running_pool
from tests.vision.decoding.test_confinement import family

async def main():
    async with running_pool(processes=2) as pool:
        held, _ = pool.process_ids
        print(*family(pool), flush=True)
        os.kill(held, signal.SIGSTOP)
        await asyncio.gather(*(pool.decode(png(), field=FIELD) for _ in range(9)))

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
async def test_nothing_is_left_of_a_gateway_that_was_killed(number: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    assert process.stdout is not None
    processes = [int(pid) for pid in (await process.stdout.readline()).split()]
    assert len(processes) == 5
    # One decoder hangs in a file, and the other has none.
    await asyncio.sleep(0.3)
    # Nothing that is shared has a name which could stay behind.
    for pid in (process.pid, *processes):
        assert "/dev/shm/" not in Path(f"/proc/{pid}/maps").read_text()
    process.send_signal(number)
    await process.wait()
    await until_async(lambda: all(map(is_gone, processes)))


async def test_a_pool_may_be_started_from_a_thread() -> None:
    async def decode() -> int:
        async with running_pool() as pool:
            return (await pool.decode(png(), field=FIELD)).frames_taken

    assert await asyncio.to_thread(asyncio.run, decode()) == 1
