"""The server of a part for the other parts: only callers with the system's secret are served.

The secret is compared before a message is received, so that a stranger costs no more than its headers.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from experts.transport.secret import SystemSecret

REFUSAL = (
    "this port is for the parts of one EchoVLM-Ray among themselves, and the call does not carry its secret: call the "
    "gateway or Control"
)


class SecretInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses every call, of health and reflection too, that does not carry the secret."""

    def __init__(self, secret: SystemSecret) -> None:
        self._secret = secret
        self._refused = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Part of grpc's interface."""
        if self._secret.matches(handler_call_details.invocation_metadata or ()):
            return await continuation(handler_call_details)
        return self._refused


def inner_server(host: str, secret: SystemSecret, port: int = 0) -> GrpcServer:
    """A server for the other parts of the system, that is not started yet.

    Args:
        host: an address of this machine.
        secret: of the system.
        port: 0 lets the system choose one.

    Raises:
        ValueError: there is no secret.
    """
    if not secret.text:
        raise ValueError("a server between the parts needs the system's secret")
    # TLS between machines belongs here, and into `InnerChannels.credentials` on the other side.
    return GrpcServer(ServerOptions(host=host, port=port), first=[SecretInterceptor(secret)])


async def _refuse(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
