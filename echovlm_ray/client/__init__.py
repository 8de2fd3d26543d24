"""The Python client of EchoVLM. Needs only the base install, without torch and ray.

    from echovlm_ray.client import EchoVLMClient

    with EchoVLMClient("127.0.0.1:50051") as client:
        print(client.generate("scan.dcm", task="report").text)

`AsyncEchoVLMClient` is the same for asyncio. All errors are in `echovlm_ray.client.errors` and derive from
`EchoVLMError`. Not a medical device: nothing that the model writes is a diagnosis.
"""

from echovlm_ray.client.asynchronous import AsyncAnswerStream, AsyncEchoVLMClient
from echovlm_ray.client.connection import TLS
from echovlm_ray.client.errors import (
    CallCancelledError,
    DeadlineExceededError,
    EchoVLMError,
    FailedPreconditionError,
    FieldViolation,
    InternalServerError,
    InvalidRequestError,
    NotFoundError,
    OrganInCanaryError,
    OverloadedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from echovlm_ray.client.request import GenerateOptions
from echovlm_ray.client.synchronous import AnswerStream, EchoVLMClient
from echovlm_ray.client.types import (
    Answer,
    Event,
    Limits,
    ModelInfo,
    Organ,
    OrganShare,
    Provenance,
    Summary,
)
from echovlm_ray.events import Accepted, Text

__all__ = [
    "TLS",
    "Accepted",
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncEchoVLMClient",
    "CallCancelledError",
    "DeadlineExceededError",
    "EchoVLMClient",
    "EchoVLMError",
    "Event",
    "FailedPreconditionError",
    "FieldViolation",
    "GenerateOptions",
    "InternalServerError",
    "InvalidRequestError",
    "Limits",
    "ModelInfo",
    "NotFoundError",
    "Organ",
    "OrganInCanaryError",
    "OrganShare",
    "OverloadedError",
    "PermissionDeniedError",
    "Provenance",
    "Summary",
    "Text",
    "UnauthenticatedError",
    "UnavailableError",
]
