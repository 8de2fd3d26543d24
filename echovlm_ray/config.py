"""The one configuration of a deployment: a YAML file, validated before anything starts.

Every field says what to do with it in the form "when this, do that". The defaults serve the demo checkpoint on a
two-core machine; `cluster/local.yaml` holds them with the same comments. Reading a file, with line numbers in the
errors, is `echovlm_ray.config_file`.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from echovlm_ray.hosts import is_loopback
from router.rollouts.settings import RolloutSettings

Port = Annotated[int, Field(ge=0, le=65535)]
PositiveInt = Annotated[int, Field(ge=1)]
Quota = Annotated[int, Field(ge=1, le=10**12)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


# Qwen2-VL's numbers: two frames are looked at together, a token stands for 2 × 2 patches of two frames with 14 × 14
# pixels of 3 colours in float32, and a picture stands between two control tokens.
FRAMES_PER_TOKEN = 2
PATCHES_PER_TOKEN = 4
PATCH_BYTES = 2 * 14 * 14 * 3 * 4
TOKENS_AROUND_PICTURE = 2
# What a prompt's text takes at least: the instructions of a task, and a question.
TEXT_TOKENS = 512
# What a message between two parts of the system holds, and one to the gateway, each with room for what is around.
MAX_INTERNAL_BYTES = 255 * 1024 * 1024
MAX_REQUEST_BYTES = 2**31 - 2 * 1024 * 1024


class ContradictionError(ValueError):
    """Two fields cannot both be as they are. The text names both and the ways out."""

    def __init__(self, message: str, *fields: str) -> None:
        """Takes the text and the dotted paths of the fields at fault, the one to look at first in front."""
        super().__init__(message)
        self.fields = fields


class Section(BaseModel):
    """Base of every section: frozen, and a field that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Resources(Section):
    """What one replica of a deployment occupies, and how many replicas there are."""

    # When one replica cannot keep up or must not be a single point of failure, raise it.
    replicas: PositiveInt = 1
    # When Ray refuses to place the replicas, lower it; it reserves a share and limits nothing.
    num_cpus: NonNegativeFloat = 0.1
    # When the part should run on a GPU, set its share of one: 1 for a whole GPU, 0.25 for four replicas on one.
    num_gpus: NonNegativeFloat = 0.0
    # When the part must run on certain nodes of a cluster only, name a resource that their `ray start --resources`
    # gives them, with the amount that a replica takes: {heart-node: 1}.
    node_resources: dict[str, NonNegativeFloat] = {}


class ModelSection(Section):
    """Which weights are served, and how they are computed."""

    # When you serve your own model, give the folder that `echoray checkpoint split` made.
    checkpoint: Path = Path("checkpoints/demo")
    # When "auto", a replica with a share of a GPU uses it and any other the CPU; "cpu" and "cuda" force one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # When "auto", the backbone's weights stay as the checkpoint has them; otherwise they are converted at load. Experts
    # compute in the backbone's dtype either way.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # When "auto", clone checkpoints are routed by organ and partitions flat, as released.
    routing: Literal["auto", "organs", "flat"] = "auto"
    # When nothing tells a request's organ, this one is used and the response says so.
    default_organ: str = "breast"
    # When a caller names more organs than this, the request is refused.
    max_organs_per_request: PositiveInt = 2
    # When more than one torch thread per process pays (many cores a replica), raise it.
    torch_threads: PositiveInt = 1


class TLSSection(Section):
    """Certificates for a server. All three paths are PEM files."""

    # When clients come from other machines, give the server's certificate chain and its key.
    certificate: Path
    key: Path
    # When clients must prove who they are, give the authority that signed their certificates.
    client_authority: Path | None = None


class DecodersSection(Section):
    """The processes beside a gateway that decode images, and what one file may take. A file over a limit is refused."""

    # When many images arrive at once and cores are free, raise it: so many files are decoded at the same time.
    processes: PositiveInt = 2
    # When sound files are refused for their processor time (seconds), raise it; so long can a hostile file keep a
    # decoder from others.
    max_cpu_s: PositiveFloat = 10.0
    # When sound files are refused for the memory that decoding them takes (bytes), raise it; each process may take it.
    max_memory_bytes: Annotated[int, Field(ge=64 * 1024 * 1024)] = 1024 * 1024 * 1024


class QuotaSection(Section):
    """What one caller may take of each gateway replica; what is not set is not limited but as it says."""

    # When one caller should have fewer requests under way at once, give a number. The last sixteenth of
    # gateway.max_requests is for callers that have none under way in any case.
    concurrent: Quota | None = None
    # When one caller should send fewer requests, give how many a minute; those that it saved up are at most that many.
    requests_per_minute: Quota | None = None
    # When one caller should compute less, give how many tokens a minute, prompts and answers together. A request is let
    # in while there are any left; what it takes beyond them is owed.
    tokens_per_minute: Quota | None = None


class GatewaySection(Section):
    """The public gRPC server: what it listens on, and the limits of a request."""

    # When other machines call, listen on their network's address; without TLS only loopback is allowed.
    host: str = "127.0.0.1"
    # When the port is taken, choose another; 0 lets the system choose and prints which.
    port: Port = 50051
    # When set, the server speaks TLS only.
    tls: TLSSection | None = None
    # When set, a call must carry "authorization: Bearer <token>" with one of the lines of this file.
    token_file: Path | None = None
    # When more requests than this are under way at once, further ones end RESOURCE_EXHAUSTED with a retry hint.
    max_requests: PositiveInt = 64
    # When a request has more images, it is refused.
    max_images: PositiveInt = 8
    # When one image file has more bytes, it is refused.
    max_image_bytes: PositiveInt = 64 * 1024 * 1024
    # When an image, or all the frames taken of a cine loop, decode to more pixels, it is refused before decoding.
    max_image_pixels: PositiveInt = 40_000_000
    # When the text around the picture matters more than what it hides, set it to false; true keeps of a DICOM only the
    # box around its ultrasound regions, which leaves out most burned-in text, patient names included.
    crop_to_regions: bool = True
    # When a cine loop has more frames, this many are taken, evenly spread; the model looks at two together.
    max_frames: Annotated[int, Field(ge=2)] = 8
    # When an image, or two frames of a cine loop, would take more visual tokens, they are scaled down to fit, also
    # below the minimum of the checkpoint's preprocessor_config.json.
    max_visual_tokens: Annotated[int, Field(ge=16)] = 196
    # When a request does not say how long its answer may get, this many tokens.
    default_new_tokens: PositiveInt = 256
    # When a call carries no deadline, this one, in seconds.
    default_deadline_s: PositiveFloat = 300.0
    # When all files of a request together have more bytes, it is refused before it is read.
    max_request_bytes: PositiveInt = 64 * 1024 * 1024
    # When many large requests come at once and are refused although there is memory, raise it: half of it holds
    # requests that are arriving, each counted as max_request_bytes, and half those that are being decoded.
    max_received_bytes: PositiveInt = 1024 * 1024 * 1024
    # When callers trust each other with what they ask, set "all": then prompts and images that begin alike are computed
    # once for all of them. "token" does so for each token, so that the time to the first word tells no caller what
    # another one asked. Where callers show no credentials they share in either case.
    share_caches: Literal["token", "all"] = "token"
    # When callers should be limited, give what each may take: a caller is a token, or a client certificate.
    quota: QuotaSection = QuotaSection()
    # When some callers may take more or less than that, name them: as the token file does behind the token, or as the
    # certificate does.
    quotas: dict[str, QuotaSection] = {}
    decoders: DecodersSection = DecodersSection()
    resources: Resources = Resources()


class VisionSection(Section):
    """The vision encoder."""

    # When the same images come again and again, a larger cache of embeddings spares encoding them.
    cache_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024
    # When many requests arrive at once, up to this many patches are encoded in one forward pass.
    max_batch_patches: PositiveInt = 16_384
    # When more inputs than this wait, further ones end RESOURCE_EXHAUSTED.
    max_queue: PositiveInt = 128
    resources: Resources = Resources()


class RouterSection(Section):
    """The language backbone, its cache, its batch, and its streams to the expert groups."""

    # When more requests should decode together, raise it; each step then takes longer.
    max_batch_size: PositiveInt = 32
    # When more requests than this wait for a place in the batch, further ones end RESOURCE_EXHAUSTED.
    max_queue: PositiveInt = 128
    # When a prompt has more tokens, visual ones included, it is refused. It must hold all the pictures that
    # gateway.max_images, max_frames and max_visual_tokens allow, and 512 tokens of text.
    max_prompt_tokens: PositiveInt = 8192
    # When a request asks for more new tokens, it is refused.
    max_new_tokens: PositiveInt = 1024
    # When requests wait although the batch has room, raise it: the KV cache holds this many tokens in all.
    kv_cache_tokens: PositiveInt = 32_768
    # When prompts are long and decoding requests stall behind them, lower it: prompt tokens computed per step, at
    # least the 16 of a block.
    max_prefill_tokens: Annotated[int, Field(ge=16)] = 512
    # When an exchange with the experts takes longer than the dense MLP and the shared expert (slow network, fast GPU),
    # set it to 2: each step is computed in two halves, and the experts of one work during the other's attention.
    micro_batches: Literal[1, 2] = 1
    # When prompts that begin alike (the same instructions, the same images) should be computed again each time, set it
    # to false; true keeps in the KV cache what requests leave behind, as long as no other request needs the room.
    prefix_reuse: bool = True
    # When a caller asks for logits that take more bytes than this, the request is refused (tests and evaluation ask).
    max_logits_bytes: PositiveInt = 64 * 1024 * 1024
    # When a request runs longer than this, in seconds, it ends, whatever deadline its caller gave.
    max_request_s: PositiveFloat = 3600.0
    # When an exchange with an expert replica takes longer, the replica counts as lost and its requests are retried.
    exchange_timeout_s: PositiveFloat = 10.0
    # When expert replicas on the router's machine should have more tokens in memory that they share with it, raise it
    # (bytes in all, used while exchanges are under way): what does not fit travels in the messages. 0 shares none.
    shared_memory_bytes: Annotated[int, Field(ge=0, le=2**36)] = 256 * 1024 * 1024
    # When the experts should run inside the router's process (to compare, or where one GPU holds all), set "local".
    experts: Literal["remote", "local"] = "remote"
    resources: Resources = Resources()


class ExpertsSection(Section):
    """The expert groups, one Serve application per organ."""

    # When an organ gets more traffic than others, or its replicas need a GPU, name it under `organs`.
    resources: Resources = Resources()
    # When set for an organ, these resources replace the ones above.
    organs: dict[str, Resources] = {}
    # When you compare kernels or wrote one, name it; "auto" is the packed kernel on a CPU, and measures on a GPU.
    kernel: str = "auto"
    # When only bundles may load that were packed in the dtype of the backbone, set "refuse"; "convert" converts the
    # weights of others when they load, and `echoray status` says from what.
    other_dtype: Literal["convert", "refuse"] = "convert"
    # When loading a bundle would take a replica's resident weights above this many bytes, the load is refused.
    max_resident_bytes: PositiveInt = 16 * 1024**3
    # When bundles come from a registry that several machines share, give its folder or a URL like s3://bucket/experts;
    # the checkpoint's own registry/ folder is read besides.
    registry: str | None = None
    # When the registry's file system needs settings, give fsspec's, like endpoint_url for an S3 of your own; keep
    # credentials in the environment (AWS_ACCESS_KEY_ID and so on).
    registry_options: dict[str, str | int | bool] = {}
    # When fetched bundles fill the disk of a machine, lower it; the least recently used files go first.
    registry_cache_bytes: PositiveInt = 64 * 1024**3
    # When the copies of the bundles in use, up to three an organ, must lie on another disk of each machine, give a
    # folder; they let replicas and the whole system restart while the registry is away. When unset, it lies beside the
    # rollouts' database.
    kept_bundles: Path | None = None
    # When only bundles signed by one of your keys may load, set "required".
    signatures: Literal["optional", "required"] = "optional"
    # When bundles are signed, give the public keys, PEM files; a signature that is there must then be by one of them.
    public_keys: tuple[Path, ...] = ()
    # When more exchanges than this wait in one replica, further ones are refused and retried by the router.
    max_queue: PositiveInt = 1024
    # When the machine runs other programs that matter less than the experts, lower it (0 to 19, as of the command
    # nice): where cores are few, the experts' processes leave them to the router's, for which every request waits.
    niceness: Annotated[int, Field(ge=0, le=19)] = 5

    def resources_of(self, organ: str) -> Resources:
        """The resources of one organ's group."""
        return self.organs.get(organ, self.resources)


class ControlSection(Section):
    """Control: the list of live expert versions, and the status of the system."""

    # When operators work from other machines, listen on their network's address; without TLS only loopback.
    host: str = "127.0.0.1"
    # When the port is taken, choose another; 0 lets the system choose.
    port: Port = 50052
    # When set, the server speaks TLS only.
    tls: TLSSection | None = None
    # When set, a call must carry "authorization: Bearer <token>" with one of the lines of this file.
    token_file: Path | None = None
    # When pushes over a slow line are cut off, raise it: seconds without a further piece of the bundle, or with less
    # than 64 KiB of it.
    push_idle_s: PositiveFloat = 30.0
    # When Ray refuses to place Control, lower it. There is one replica, always: it is the only writer of what is live.
    num_cpus: NonNegativeFloat = 0.1
    # When rollouts must go on however busy the machine is, lower it (0 to 19, as of the command nice): where cores are
    # few, Control leaves them to those that answer.
    niceness: Annotated[int, Field(ge=0, le=19)] = 10


class RolloutsSection(Section, RolloutSettings):
    """How an organ's experts are replaced; what is not said here is in `router.rollouts.settings`."""

    # When unset, a file in the checkpoint's folder, or, where that cannot be written, in your own state folder; in a
    # cluster of several machines give a PostgreSQL URL, postgresql://user@host/name, with the password in PGPASSWORD.
    database: str | None = None
    # When a pushed bundle is larger, it is refused before its first file.
    max_push_bytes: PositiveInt = 64 * 1024**3
    # When verifying a sound bundle fails for want of memory, raise it: what that may take beside the bundle's files.
    verify_memory_bytes: PositiveInt = 8 * 1024**3

    @field_validator("database")
    @classmethod
    def _is_supported(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("sqlite:///", "postgresql://")):
            raise ValueError("a URL like sqlite:////var/lib/echovlm/rollouts.db or postgresql://user@host/name")
        return url


class ServeSection(Section):
    """How Ray and Ray Serve run the parts."""

    # When a killed replica should be replaced faster, lower it (seconds between health checks).
    health_check_period_s: PositiveFloat = 1.0
    # When a replica is slow to answer health checks under load, raise it.
    health_check_timeout_s: PositiveFloat = 10.0
    # When requests take long and should finish before a replica stops, raise it.
    graceful_shutdown_timeout_s: NonNegativeFloat = 20.0
    # When the object store is too large for the machine, lower it; no tensor ever travels through it.
    object_store_bytes: Annotated[int, Field(ge=78_643_200)] = 128 * 1024 * 1024
    # When Prometheus should find the metrics under a known port of its own, give it; 0 lets the system choose and
    # prints which. They need no credentials: keep the port behind a firewall. A cluster has one of its own, given to
    # ray start as --metrics-export-port.
    metrics_port: Port = 0
    # When "auto", the parts talk over loopback on one machine and over the nodes' addresses in a cluster of several;
    # set "node" when a cluster of one node will grow, and then keep its network to yourself: it is not encrypted.
    internal_network: Literal["auto", "loopback", "node"] = "auto"
    # When a newer grpcio measures faster with its event engine, set it to true.
    grpc_event_engine: bool = False


class Config(Section):
    """Everything about one deployment."""

    model: ModelSection = ModelSection()
    gateway: GatewaySection = GatewaySection()
    vision: VisionSection = VisionSection()
    router: RouterSection = RouterSection()
    experts: ExpertsSection = ExpertsSection()
    control: ControlSection = ControlSection()
    rollouts: RolloutsSection = RolloutsSection()
    serve: ServeSection = ServeSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_tokens()
        self._check_pictures()
        self._check_listeners()
        self._check_quotas()
        self._check_devices()
        self._check_signatures()
        self._check_dtypes()
        return self

    def _check_tokens(self) -> None:
        if self.gateway.default_new_tokens > self.router.max_new_tokens:
            raise ContradictionError(
                f"gateway.default_new_tokens ({self.gateway.default_new_tokens}) is above router.max_new_tokens "
                f"({self.router.max_new_tokens}): lower the first or raise the second",
                "gateway.default_new_tokens",
                "router.max_new_tokens",
            )
        if self.router.max_prompt_tokens + self.router.max_new_tokens > self.router.kv_cache_tokens:
            raise ContradictionError(
                f"router.kv_cache_tokens ({self.router.kv_cache_tokens}) cannot hold even one longest request "
                f"(max_prompt_tokens {self.router.max_prompt_tokens} + max_new_tokens {self.router.max_new_tokens}): "
                "raise it or lower those",
                "router.kv_cache_tokens",
                "router.max_prompt_tokens",
                "router.max_new_tokens",
            )

    def _check_pictures(self) -> None:
        """What the gateway's limits allow must pass the parts behind it."""
        gateway = self.gateway
        pairs = -(-gateway.max_frames // FRAMES_PER_TOKEN)
        loop_tokens = pairs * gateway.max_visual_tokens
        tokens = gateway.max_images * (loop_tokens + TOKENS_AROUND_PICTURE) + TEXT_TOKENS
        if tokens > self.router.max_prompt_tokens:
            raise ContradictionError(
                f"router.max_prompt_tokens ({self.router.max_prompt_tokens}) cannot hold what the gateway allows: "
                f"{gateway.max_images} cine loops (gateway.max_images) of {pairs} pairs of frames (gateway.max_frames "
                f"{gateway.max_frames}) at {gateway.max_visual_tokens} tokens (gateway.max_visual_tokens), and "
                f"{TEXT_TOKENS} of text, are {tokens}: raise the first or lower one of the others",
                "router.max_prompt_tokens",
                "gateway.max_images",
                "gateway.max_frames",
                "gateway.max_visual_tokens",
            )
        if loop_tokens * PATCHES_PER_TOKEN > self.vision.max_batch_patches:
            raise ContradictionError(
                f"vision.max_batch_patches ({self.vision.max_batch_patches}) cannot hold one cine loop of {pairs} "
                f"pairs of frames (gateway.max_frames {gateway.max_frames}) at {gateway.max_visual_tokens} visual "
                f"tokens (gateway.max_visual_tokens), {loop_tokens * PATCHES_PER_TOKEN} patches: raise the first or "
                "lower one of the others",
                "vision.max_batch_patches",
                "gateway.max_frames",
                "gateway.max_visual_tokens",
            )
        if gateway.max_images > self.vision.max_queue:
            raise ContradictionError(
                f"vision.max_queue ({self.vision.max_queue}) cannot hold the images of one request "
                f"(gateway.max_images {gateway.max_images}): raise the first or lower the second",
                "vision.max_queue",
                "gateway.max_images",
            )
        patch_bytes = gateway.max_images * loop_tokens * PATCHES_PER_TOKEN * PATCH_BYTES
        if patch_bytes > MAX_INTERNAL_BYTES:
            raise ContradictionError(
                f"gateway.max_images ({gateway.max_images}), max_frames ({gateway.max_frames}) and max_visual_tokens "
                f"({gateway.max_visual_tokens}) make {patch_bytes} bytes of patches in one request, and a message "
                f"between two parts holds {MAX_INTERNAL_BYTES}: lower one",
                "gateway.max_images",
                "gateway.max_frames",
                "gateway.max_visual_tokens",
            )
        if not gateway.max_image_bytes <= gateway.max_request_bytes <= MAX_REQUEST_BYTES:
            raise ContradictionError(
                f"gateway.max_request_bytes ({gateway.max_request_bytes}) must hold one file of "
                f"gateway.max_image_bytes ({gateway.max_image_bytes}), and be at most the {MAX_REQUEST_BYTES} bytes "
                "that a gRPC message holds: change one",
                "gateway.max_image_bytes",
                "gateway.max_request_bytes",
            )
        if gateway.max_received_bytes < 2 * gateway.max_request_bytes:
            raise ContradictionError(
                f"gateway.max_received_bytes ({gateway.max_received_bytes}) must hold two requests of "
                f"gateway.max_request_bytes ({gateway.max_request_bytes}): raise the first or lower the second",
                "gateway.max_received_bytes",
                "gateway.max_request_bytes",
            )

    def _check_listeners(self) -> None:
        for name, server in (("gateway", self.gateway), ("control", self.control)):
            if is_loopback(server.host):
                continue
            if server.tls is None:
                raise ContradictionError(
                    f"{name}.host is {server.host!r}, which other machines can reach, but {name}.tls is not set: "
                    "configure certificates, or listen on 127.0.0.1",
                    f"{name}.host",
                    f"{name}.tls",
                )
            if server.token_file is None and server.tls.client_authority is None:
                raise ContradictionError(
                    f"{name}.host is {server.host!r}, which other machines can reach, and nothing says who may call: "
                    f"set {name}.token_file or {name}.tls.client_authority, or listen on 127.0.0.1",
                    f"{name}.host",
                    f"{name}.token_file",
                    f"{name}.tls",
                )
        if self.gateway.port and self.gateway.port == self.control.port:
            raise ContradictionError(
                f"gateway.port and control.port are both {self.gateway.port}: change one",
                "control.port",
                "gateway.port",
            )

    def _check_quotas(self) -> None:
        gateway = self.gateway
        known = gateway.token_file is not None or (gateway.tls is not None and gateway.tls.client_authority is not None)
        if not known and (gateway.quota != QuotaSection() or gateway.quotas):
            raise ContradictionError(
                "gateway.quota and gateway.quotas go by callers, but callers show no credentials: set "
                "gateway.token_file or gateway.tls.client_authority",
                "gateway.quota",
                "gateway.token_file",
            )

    def _check_signatures(self) -> None:
        if self.experts.signatures == "required" and not self.experts.public_keys:
            raise ContradictionError(
                'experts.signatures is "required" but experts.public_keys names no key, so no bundle could load: '
                'give the public keys, or set experts.signatures to "optional"',
                "experts.signatures",
                "experts.public_keys",
            )

    def _check_dtypes(self) -> None:
        if self.experts.other_dtype == "refuse" and self.model.dtype != "auto":
            raise ContradictionError(
                f'model.dtype is "{self.model.dtype}", which converts all weights at load, but experts.other_dtype is '
                '"refuse", which lets none be converted: set model.dtype to "auto" or experts.other_dtype to "convert"',
                "experts.other_dtype",
                "model.dtype",
            )

    def _check_devices(self) -> None:
        if self.model.device != "cuda":
            return
        parts = {
            "vision.resources": self.vision.resources,
            "router.resources": self.router.resources,
            "experts.resources": self.experts.resources,
        }
        parts |= {f"experts.organs.{organ}": resources for organ, resources in self.experts.organs.items()}
        if self.router.experts == "local":
            parts = {name: resources for name, resources in parts.items() if not name.startswith("experts.")}
        for name, resources in parts.items():
            if not resources.num_gpus:
                raise ContradictionError(
                    f'model.device is "cuda" but {name}.num_gpus is 0, so Ray shows that part no GPU: '
                    'give it a share of one, or set model.device to "auto"',
                    f"{name}.num_gpus",
                    "model.device",
                )
