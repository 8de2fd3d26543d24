"""Errors of a request above the expert groups. `serving.grpc.errors` maps all of it to gRPC."""


class InvalidRequestError(ValueError):
    """The caller sent something that cannot be served. Names the field, as `GenerateRequest` spells it."""

    def __init__(self, field: str, description: str) -> None:
        """Args are the field's path, for example "images[1].content", and what is wrong with it, fix included."""
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class MessageTooLargeError(ValueError):
    """A message is longer than a server takes. The text names the limit."""


class UnknownServiceError(LookupError):
    """Nothing is known of the health of a service of that name."""


class OverloadedError(RuntimeError):
    """A queue is full. The text names the limit; the caller may come back after `retry_after_s`."""

    def __init__(self, description: str, retry_after_s: float = 1.0, *, reason: str = "busy") -> None:
        """Takes the text, the pause, and a word by which metrics count it."""
        super().__init__(description)
        self.retry_after_s = retry_after_s
        self.reason = reason


class PartUnavailableError(RuntimeError):
    """A part of the system (vision encoder, router) does not answer now; sending again later is safe."""

    def __init__(self, part: str, reason: str, retry_after_s: float = 1.0) -> None:
        """Names the part, says why, and when to come back."""
        super().__init__(f"{part} is not available: {reason}")
        self.part = part
        self.retry_after_s = retry_after_s


class TextUnavailableError(RuntimeError):
    """The checkpoint has no tokenizer or no image processor, so the router can be called, but not the gateway."""


class PromptChangedError(ValueError):
    """A request no longer becomes the same prompt tokens as when it was answered first."""

    def __init__(self) -> None:
        super().__init__(
            "the request becomes another prompt than when it was answered: the prompt template, the tokenizer or the "
            "scaling of images was changed since. Serve with the version of EchoVLM-Ray, the backbone and "
            "gateway.max_visual_tokens of that time to compute the answer again"
        )


class UnauthenticatedError(RuntimeError):
    """The call carries no valid credentials."""


class DeadlineError(RuntimeError):
    """The caller's deadline passed while the request waited or ran."""


class ShuttingDownError(RuntimeError):
    """The replica that was called is about to stop; another one, or its successor, will answer."""
