"""A real gRPC server with a scripted EchoVLM service, for failures that a healthy system does not have."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos import echovlm_pb2, echovlm_pb2_grpc, router_pb2

SUMMARY = echovlm_pb2.GenerateSummary(
    request_id="from-the-server",
    finish_reason=router_pb2.FINISH_REASON_STOP,
    prompt_tokens=11,
    completion_tokens=3,
    provenance=router_pb2.Provenance(
        expert_set_id="5" * 64,
        backbone_digest="b" * 64,
        organ_source=router_pb2.ORGAN_SOURCE_CALLER,
        organs=[
            router_pb2.OrganProvenance(
                organ="heart", bundle_version="1.2.0", bundle_digest="d" * 64, routed_share=0.75
            ),
            router_pb2.OrganProvenance(
                organ="liver", bundle_version="1.0.0", bundle_digest="e" * 64, routed_share=0.25
            ),
        ],
    ),
    notices=["the organ was guessed"],
)
PIECES = ("The left ", "ventricle ", "心脏")


class ScriptedEchoVLM(echovlm_pb2_grpc.EchoVLMServicer):
    """Fails `failures` times, then answers; records the requests."""

    def __init__(self) -> None:
        self.failures: list[status_pb2.Status] = []
        self.fail_after: int | None = None
        self.delay_s = 0.0
        self.omit_summary = False
        self.wait_after: int | None = None
        self.calls = 0
        self.requests: list[echovlm_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.started = threading.Event()
        self.cancelled = threading.Event()

    async def _receive(self, context: grpc.aio.ServicerContext) -> None:
        self.calls += 1
        self.metadata.append(dict(context.invocation_metadata()))
        if self.failures and self.fail_after is None:
            await context.abort_with_status(rpc_status.to_status(self.failures.pop(0)))

    async def Generate(
        self, request: echovlm_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> echovlm_pb2.GenerateResponse:
        await self._receive(context)
        self.requests.append(request)
        self.started.set()
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return echovlm_pb2.GenerateResponse(text="".join(PIECES), summary=SUMMARY)

    async def GenerateStream(
        self, request: echovlm_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[echovlm_pb2.GenerateEvent]:
        await self._receive(context)
        self.requests.append(request)
        self.started.set()
        try:
            yield echovlm_pb2.GenerateEvent(
                accepted=echovlm_pb2.RequestAccepted(prompt_tokens=11, visual_tokens=4, frames=[1, 8])
            )
            for index, piece in enumerate(PIECES):
                await asyncio.sleep(self.delay_s)
                if index == self.wait_after:
                    await asyncio.Event().wait()
                if index == self.fail_after and self.failures:
                    await context.abort_with_status(rpc_status.to_status(self.failures.pop(0)))
                yield echovlm_pb2.GenerateEvent(text=piece)
        # The second where the call is cancelled while a message is being sent.
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        if not self.omit_summary:
            yield echovlm_pb2.GenerateEvent(summary=SUMMARY)

    async def GetModelInfo(
        self, request: echovlm_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> echovlm_pb2.ModelInfo:
        await self._receive(context)
        return echovlm_pb2.ModelInfo(
            name="echovlm-test",
            version="0.0.1",
            backbone_digest="b" * 64,
            expert_set_id="5" * 64,
            organs=[echovlm_pb2.OrganInfo(organ="heart", bundle_version="1.2.0", bundle_digest="d", num_experts=4)],
            limits=echovlm_pb2.Limits(max_images=8, max_image_bytes=1024, max_new_tokens=99),
            default_organ="heart",
            description="[for] tests",
        )


@contextmanager
def serving(
    servicer: ScriptedEchoVLM,
    credentials: grpc.ServerCredentials | None = None,
    port: int = 0,
    max_receive_bytes: int = -1,
) -> Iterator[str]:
    """Serves on loopback in a thread with its own event loop; gives the address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", max_receive_bytes)])
        echovlm_pb2_grpc.add_EchoVLMServicer_to_server(servicer, server)
        if credentials is None:
            bound = server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            bound = server.add_secure_port(f"127.0.0.1:{port}", credentials)
        await server.start()
        return server, bound

    server, bound = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def status(code: grpc.StatusCode, text: str, *details: Message) -> status_pb2.Status:
    """A `google.rpc.Status` with details."""
    packed = []
    for detail in details:
        message = any_pb2.Any()
        message.Pack(detail)
        packed.append(message)
    return status_pb2.Status(code=code.value[0], message=text, details=packed)


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    """When to come back."""
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)
