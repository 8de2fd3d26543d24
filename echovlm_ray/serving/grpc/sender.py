"""The sender of a call, by which a server shares its memory among callers."""

from typing import Any

import grpc

from echovlm_ray.serving.core.caller import current_caller


def sender_of(context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
    """The caller of the call that is being served, or the machine that it comes from where it shows no credentials."""
    return current_caller().id or context.peer().rpartition(":")[0].encode()
