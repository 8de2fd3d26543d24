"""Errors of requests outside the expert groups. `serving.grpc.errors` maps them to gRPC."""


class InvalidRequestError(ValueError):
    """The request is invalid. Names the field as in `GenerateRequest`."""

    def __init__(self, field: str, description: str) -> None:
        """Takes the field's path, for example "images[1].content", and the problem with its fix."""
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class MessageTooLargeError(ValueError):
    """A message is too long. The text names the limit."""


class UnknownServiceError(LookupError):
    """There is no health status for a service of this name."""


class OverloadedError(RuntimeError):
    """A queue is full. The text names the limit; the caller may retry after `retry_after_s`."""

    def __init__(self, description: str, retry_after_s: float = 1.0, *, reason: str = "busy") -> None:
        """Takes the text, the pause, and a word by which metrics count it."""
        super().__init__(description)
        self.retry_after_s = retry_after_s
        self.reason = reason


class PartUnavailableError(RuntimeError):
    """A part of the system (vision encoder, router) does not answer now. A later retry is safe."""

    def __init__(self, part: str, reason: str, retry_after_s: float = 1.0) -> None:
        """Takes the part, the reason, and the time before a retry."""
        super().__init__(f"{part} is not available: {reason}")
        self.part = part
        self.retry_after_s = retry_after_s


class TextUnavailableError(RuntimeError):
    """The checkpoint has no tokenizer or image processor, so only the router can be called, not the gateway."""


class PromptChangedError(ValueError):
    """A request's prompt tokens differ from those of its first answer."""

    def __init__(self) -> None:
        super().__init__(
            "the request becomes another prompt than when it was answered: the prompt template, the tokenizer or the "
            "scaling of images was changed since. Serve with the version of EchoVLM-Ray, the backbone and "
            "gateway.max_visual_tokens of that time to compute the answer again"
        )


class UnauthenticatedError(RuntimeError):
    """The call has no valid credentials."""


class DeadlineError(RuntimeError):
    """The caller's deadline passed while the request waited or ran."""


class ShuttingDownError(RuntimeError):
    """The replica is shutting down; another one will answer."""
