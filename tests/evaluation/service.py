"""A scripted gateway over real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos import echovlm_pb2, echovlm_pb2_grpc, router_pb2


@dataclass
class ScriptedGateway(echovlm_pb2_grpc.EchoVLMServicer):
    """Answers each request with a function of it; counts requests and their concurrency."""

    answer: Callable[[echovlm_pb2.GenerateRequest], str]
    seconds: float = 0.0
    expert_set_id: str = "set-1"
    requests: list[echovlm_pb2.GenerateRequest] = field(default_factory=list)
    # Refuses so many requests first, each with a retry hint of `retry_s`.
    full: int = 0
    retry_s: float = 0.05
    invalid: Callable[[echovlm_pb2.GenerateRequest], bool] = lambda request: False
    failing: int = 0
    under_way: int = 0
    most: int = 0

    async def Generate(
        self, request: echovlm_pb2.GenerateRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> echovlm_pb2.GenerateResponse:
        if self.full:
            self.full -= 1
            await context.abort_with_status(rpc_status.to_status(retry_later(self.retry_s)))
        if self.invalid(request):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "images[0].content: is damaged")
        if self.failing:
            self.failing -= 1
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")
        self.requests.append(request)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(self.seconds)
            provenance = router_pb2.Provenance(
                expert_set_id=self.expert_set_id,
                organ_source=router_pb2.ORGAN_SOURCE_PROTOTYPE,
                organs=[router_pb2.OrganProvenance(organ="breast", routed_share=1.0)],
            )
            summary = echovlm_pb2.GenerateSummary(
                finish_reason=router_pb2.FINISH_REASON_STOP, completion_tokens=7, provenance=provenance
            )
            return echovlm_pb2.GenerateResponse(text=self.answer(request), summary=summary)
        finally:
            self.under_way -= 1

    async def GetModelInfo(
        self, request: echovlm_pb2.GetModelInfoRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> echovlm_pb2.ModelInfo:
        return echovlm_pb2.ModelInfo(
            name="scripted",
            version="1.0.0",
            backbone_digest="backbone-1",
            expert_set_id=self.expert_set_id,
            organs=[echovlm_pb2.OrganInfo(organ="breast", bundle_version="1.0.0")],
        )


def retry_later(seconds: float) -> status_pb2.Status:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(seconds * 1e9))
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full", details=[detail])


@asynccontextmanager
async def serving(gateway: ScriptedGateway) -> AsyncIterator[str]:
    """Its address, until the block ends."""
    server = grpc.aio.server()
    echovlm_pb2_grpc.add_EchoVLMServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
