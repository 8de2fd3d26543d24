"""What it costs to decode images in processes of their own: `python -m benchmarks.decoding`.

Two gateways in this process, one as it is and one that decodes on two of its own threads, are called by turns, so that
both have the same noise. Their router ends every answer immediately. The costly files are small PNGs of 39 megapixels,
which take a core for about a second each. Writes `benchmarks/results/decoding.md` and `.json`.
"""

import argparse
import asyncio
import io
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from PIL import Image
from pydicom.data import get_testdata_file
from rich.console import Console

from benchmarks.checkpoints import ROOT
from benchmarks.machine import describe
from benchmarks.measure_table import measure_table, table_head
from echovlm_ray.checkpoint.demo import make_demo
from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.fair_queue import FairThreads
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.serving.core.description import ModelDescription
from echovlm_ray.serving.core.parts import GenerateParts
from echovlm_ray.serving.grpc.gateway import GatewayService
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from echovlm_ray.serving.lm.router_client import RouterClient
from echovlm_ray.vision.decoding.pool import DecoderPool
from echovlm_ray.vision.decoding.settings import DecoderSettings
from echovlm_ray.vision.images import DecodedImage, ImageLimits, decode_image_file
from protos import echovlm_pb2, echovlm_pb2_grpc, router_pb2, router_pb2_grpc

RESULTS = Path(__file__).resolve().parent / "results"
DEMO = ROOT / "checkpoints" / "demo"
CONCURRENT = 16
THREADS = 2
# 39.7 megapixels, of the 40 that are allowed.
COSTLY_SIDE = 6300
# Threads keep decoding after their request was cancelled; after this time they have finished.
PAUSE_S = 3.0
TARGETS = {"plain PNG": 1.1, "DICOM still": 1.1, f"{CONCURRENT} image requests at once": 1.0}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line of the result: seconds with decoding on threads and in processes, medians, and the best of each."""

    name: str
    threads_s: float
    processes_s: float
    threads_best_s: float
    processes_best_s: float

    @property
    def ratio(self) -> float:
        """Processes by threads, of the medians."""
        return self.processes_s / self.threads_s


class Router(router_pb2_grpc.RouterServicer):
    """Ends every answer immediately."""

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[router_pb2.RouterGenerateResponse]:
        """One message, the last."""
        summary = router_pb2.RouterSummary(finish_reason=router_pb2.FINISH_REASON_STOP)
        yield router_pb2.RouterGenerateResponse(summary=summary)


class ThreadDecoders(DecoderPool):
    """Decodes on threads of this process, without any limit of what that takes."""

    def __init__(self, settings: DecoderSettings, threads: ThreadPoolExecutor) -> None:
        super().__init__(settings, processes=THREADS, max_cpu_s=1.0)
        self._here = settings
        self._threads = threads

    async def start(self) -> None:
        """The threads are there."""

    async def decode(self, content: bytes, *, field: str, request_id: str = "", caller: bytes = b"") -> DecodedImage:
        """What a decoder process does."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode_here, content, field)

    def _decode_here(self, content: bytes, field: str) -> DecodedImage:
        decoded = decode_image_file(content, limits=self._here.limits, field=field)
        frames = tuple(self._here.scaling.apply(frame) for frame in decoded.frames)
        return DecodedImage(frames, decoded.frames_taken, decoded.source_frames, decoded.anatomy_terms, decoded.notices)


def threaded_parts(processor: EchoVLMProcessor, router: RouterClient, gateway: GatewaySection) -> GenerateParts:
    """Parts that decode and build texts on the same two threads, as the gateway once did."""
    threads = ThreadPoolExecutor(THREADS)
    limits = ImageLimits(gateway.max_image_bytes, gateway.max_image_pixels, gateway.max_frames)
    decoders = ThreadDecoders(DecoderSettings(limits, processor.scaling(gateway.max_visual_tokens), 0), threads)
    parts = GenerateParts(processor, router, _describe, gateway=gateway, limits=RouterSection(), decoders=decoders)
    parts.text_threads = FairThreads(threads, THREADS)
    return parts


def _describe() -> ModelDescription:
    return ModelDescription("benchmark", "1.0.0", "", "", "", (), "breast")


@asynccontextmanager
async def gateways() -> AsyncIterator[tuple[Any, Any, GenerateParts]]:
    """Stubs of the one on threads and the one with processes, and the latter itself."""
    if not DEMO.is_dir():
        make_demo(DEMO)
    processor = EchoVLMProcessor.from_pretrained(DEMO)
    section = GatewaySection()
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(
            _served(router_pb2_grpc.add_RouterServicer_to_server, Router(), "echovlm.v1.Router")
        )
        client = RouterClient(lambda: [router])
        stack.push_async_callback(client.close)
        threaded = threaded_parts(processor, client, section)
        served = GenerateParts(processor, client, _describe, gateway=section, limits=RouterSection())
        stubs = []
        for each in (threaded, served):
            await each.start()
            stack.push_async_callback(each.close)
            address = await stack.enter_async_context(
                _served(echovlm_pb2_grpc.add_EchoVLMServicer_to_server, GatewayService(each), "echovlm.v1.EchoVLM")
            )
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])
            )
            stubs.append(echovlm_pb2_grpc.EchoVLMStub(channel))
        yield stubs[0], stubs[1], served


@asynccontextmanager
async def _served(register: Any, servicer: object, name: str) -> AsyncIterator[str]:
    server = GrpcServer(ServerOptions())
    server.add(register, servicer, name)
    await server.start()
    try:
        yield server.address
    finally:
        await server.stop(0)


def costly_png(side: int = COSTLY_SIDE) -> bytes:
    """A file of few bytes within all limits that takes a core for about a second."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def still_png() -> bytes:
    """A real ultrasound picture as PNG."""
    content = Path(str(get_testdata_file("examples_rgb_color.dcm"))).read_bytes()
    limits = ImageLimits(2**26, 40_000_000, 8, crop_to_regions=False)
    buffer = io.BytesIO()
    Image.fromarray(decode_image_file(content, limits=limits, field="").frames[0]).save(buffer, "PNG")
    return buffer.getvalue()


def report(*images: bytes) -> echovlm_pb2.GenerateRequest:
    """A request with images."""
    files = [echovlm_pb2.ImageFile(content=image) for image in images]
    return echovlm_pb2.GenerateRequest(images=files, task=echovlm_pb2.TASK_REPORT)


TEXT = echovlm_pb2.GenerateRequest(prompt="What is a simple cyst?")


async def compare(
    name: str, stubs: Sequence[Any], work: Callable[[Any], Awaitable[float]], repetitions: int
) -> Comparison:
    """Runs the same work, which returns its seconds, on both by turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repetitions + 2):
        for stub, times in zip(stubs, seconds, strict=True):
            taken = await work(stub)
            # The first two warm up.
            if turn >= 2:
                times.append(taken)
    threads, processes = seconds
    return Comparison(name, statistics.median(threads), statistics.median(processes), min(threads), min(processes))


async def one(stub: Any, request: echovlm_pb2.GenerateRequest) -> float:
    """Seconds of one request."""
    began = time.perf_counter()
    await stub.Generate(request, timeout=300)
    return time.perf_counter() - began


async def many(stub: Any, requests: Sequence[echovlm_pb2.GenerateRequest]) -> float:
    """Seconds of concurrent requests."""
    began = time.perf_counter()
    await asyncio.gather(*(stub.Generate(request, timeout=300) for request in requests))
    return time.perf_counter() - began


async def beside(stub: Any, request: echovlm_pb2.GenerateRequest, costly: bytes, count: int) -> float:
    """Seconds of a request after a number of costly ones, which are cancelled then."""
    calls = [stub.Generate(report(costly), timeout=300) for _ in range(count)]
    await asyncio.sleep(0.1)
    try:
        return await one(stub, request)
    finally:
        for call in calls:
            call.cancel()
        for call in calls:
            with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await call
        await asyncio.sleep(PAUSE_S)


async def measure(repetitions: int) -> tuple[list[Comparison], dict[str, float]]:
    """All lines of the result, and what the processes are like."""
    png, costly = still_png(), costly_png()
    dicom = Path(str(get_testdata_file("examples_rgb_color.dcm"))).read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56)).save(buffer, "PNG")
    small = buffer.getvalue()
    mixed = [report(png), report(dicom)] * (CONCURRENT // 2)
    async with gateways() as (threaded, processes, service):
        stubs = (threaded, processes)
        few = max(3, repetitions // 10)
        lines = [
            await compare("PNG of 56 × 56", stubs, lambda stub: one(stub, report(small)), repetitions),
            await compare("plain PNG", stubs, lambda stub: one(stub, report(png)), repetitions),
            await compare("DICOM still", stubs, lambda stub: one(stub, report(dicom)), repetitions),
            await compare(
                f"{CONCURRENT} image requests at once", stubs, lambda stub: many(stub, mixed), max(3, repetitions // 4)
            ),
            await compare("text", stubs, lambda stub: one(stub, TEXT), repetitions),
            await compare("text beside 2 costly files", stubs, lambda stub: beside(stub, TEXT, costly, 2), few),
            await compare(
                "plain PNG beside a costly file", stubs, lambda stub: beside(stub, report(png), costly, 1), few
            ),
        ]
        assert service.decoders is not None
        memory = psutil.Process(service.decoders.process_ids[0]).memory_full_info()
        return lines, {"resident_mib": memory.rss / 2**20, "own_mib": memory.uss / 2**20}


def markdown(lines: Sequence[Comparison], memory: dict[str, float]) -> str:
    """The result as Markdown."""
    table = [
        *table_head("| request | on threads, ms | in processes, ms | ratio | ratio of the best | target |"),
    ]
    for line in lines:
        target = f"≤ {TARGETS[line.name]}" if line.name in TARGETS else ""
        best = line.processes_best_s / line.threads_best_s
        table.append(
            f"| {line.name} | {line.threads_s * 1e3:.2f} | {line.processes_s * 1e3:.2f} | {line.ratio:.2f} | "
            f"{best:.2f} | {target} |"
        )
    sizes = [
        ("resident memory of a decoder", f"{memory['resident_mib']:.0f} MiB", ""),
        ("of that not shared with the others", f"{memory['own_mib']:.0f} MiB", ""),
    ]
    parts = ["# Decoding in processes", "", describe(), "", *table, "", *measure_table(sizes)]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Measures, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=40, help="of each single request (default: %(default)s)")
    options = parser.parse_args()
    lines, memory = asyncio.run(measure(options.repetitions))
    text = markdown(lines, memory)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decoding.md").write_text(text)
    data = {"lines": [asdict(line) | {"ratio": line.ratio} for line in lines], "decoder": memory}
    (RESULTS / "decoding.json").write_text(json.dumps(data, indent=1) + "\n")
    Console().print(text, markup=False)


if __name__ == "__main__":
    main()
