"""What all requests of one gateway share: the way to the router, decoders, threads, quotas and limits."""

from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.errors import OverloadedError, TextUnavailableError
from echovlm_ray.fair_queue import FairThreads
from echovlm_ray.model.processing import EchoVLMProcessor
from echovlm_ray.serving.core.caller import Caller
from echovlm_ray.serving.core.description import ModelDescription
from echovlm_ray.serving.core.images import ImageLoader, decoder_pool
from echovlm_ray.serving.core.quotas import Quotas
from echovlm_ray.vision.decoding.pool import DecoderPool
from protos import router_pb2

# Text and pictures have threads of their own, so that no text waits for a picture. The longest prompt takes seconds to
# cut into tokens, so no caller gets all of those for text.
TEXT_THREADS = 3


class TokenSource(Protocol):
    """Where tokens come from; see `serving.router_client.RouterClient`."""

    def generate(
        self, request: router_pb2.RouterGenerateRequest, *, deadline: float, request_id: str
    ) -> AsyncGenerator[router_pb2.RouterGenerateResponse, None]:
        """The tokens of one request; `deadline` in `time.monotonic` seconds. Closing the generator cancels it."""
        ...


class GenerateParts:
    """What the sessions of a gateway are given. Belongs to one event loop."""

    def __init__(
        self,
        processor: EchoVLMProcessor | None,
        router: TokenSource,
        describe: Callable[[], ModelDescription],
        *,
        gateway: GatewaySection,
        limits: RouterSection,
        decoders: DecoderPool | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            processor: of the served checkpoint; None where it has no tokenizer, and then every request is refused.
            router: where tokens come from.
            describe: what is served at this moment.
            gateway: the limits of images and of requests under way.
            limits: the limits of tokens.
            decoders: of images; None: as `gateway` says.
        """
        self._processor = processor
        self.router = router
        self.describe = describe
        self.gateway = gateway
        self.limits = limits
        self.quotas = Quotas(gateway.quota, gateway.quotas, gateway.max_requests)
        threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self.text_threads = FairThreads(threads, TEXT_THREADS, TEXT_THREADS - 1)
        self._under_way = 0
        self._images = None
        if processor is not None:
            decoders = decoders or decoder_pool(processor, gateway)
            self._images = ImageLoader(processor, decoders, gateway.decoders.processes)

    @property
    def queue_length(self) -> int:
        """Requests under way, for status."""
        return self._under_way

    @property
    def decoders(self) -> DecoderPool | None:
        """The processes that decode; None where every request is refused."""
        return None if self._images is None else self._images.decoders

    @property
    def processor(self) -> EchoVLMProcessor:
        """What makes tokens of text and images.

        Raises:
            TextUnavailableError: the checkpoint has none.
        """
        if self._processor is None:
            raise TextUnavailableError(
                "the served checkpoint has no tokenizer or no image processor, so it can only be called with token "
                "ids, at the router: copy those files into its backbone/ folder and serve again"
            )
        return self._processor

    @property
    def images(self) -> ImageLoader:
        """What loads images; there where `processor` is."""
        assert self._images is not None
        return self._images

    async def start(self) -> None:
        """Starts the decoders. To be called once, before the first request.

        Raises:
            PartUnavailableError: they cannot be started.
        """
        if self._images is not None:
            await self._images.decoders.start()

    async def close(self) -> None:
        """Ends the decoders and the threads."""
        if self._images is not None:
            await self._images.close()
        self.text_threads.shutdown()

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """The place of a caller's request; a transport takes it before it reads the request.

        Raises:
            OverloadedError: there is none, or the caller has used up its quota.
        """
        if self._under_way >= self.gateway.max_requests:
            raise OverloadedError(
                f"{self._under_way} requests are under way and that is the limit (gateway.max_requests): "
                "send the request again a little later",
                reason="max_requests",
            )
        with self.quotas.place(caller):
            self._under_way += 1
            try:
                yield
            finally:
                self._under_way -= 1
