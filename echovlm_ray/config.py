"""The configuration of a deployment: one YAML file, validated before anything starts.

Each field has a comment in the form "when this, do that". The defaults serve the demo checkpoint on a machine with two
cores; `cluster/local.yaml` repeats them with the same comments. `echovlm_ray.config_file` reads a file and reports
errors with line numbers.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from echovlm_ray.config_checks import check_consistency
from router.rollouts.settings import RolloutSettings

Port = Annotated[int, Field(ge=0, le=65535)]
PositiveInt = Annotated[int, Field(ge=1)]
Quota = Annotated[int, Field(ge=1, le=10**12)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: frozen, and a field that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Resources(Section):
    """The resources of one replica of a deployment, and the number of replicas."""

    # When one replica is too slow or must not be a single point of failure, raise it.
    replicas: PositiveInt = 1
    # When Ray cannot place the replicas, lower it. Ray reserves this share, but does not enforce it.
    num_cpus: NonNegativeFloat = 0.1
    # When the part should run on a GPU, set its share of one: 1 for a whole GPU, 0.25 for four replicas on a GPU.
    num_gpus: NonNegativeFloat = 0.0
    # When the part must run on certain nodes of a cluster only, name a custom resource of those nodes (`ray start
    # --resources`) and the amount that a replica takes: {heart-node: 1}.
    node_resources: dict[str, NonNegativeFloat] = {}


class ModelSection(Section):
    """Which weights are served, and how they are computed."""

    # When you serve your own model, set the folder that `echoray checkpoint split` wrote.
    checkpoint: Path = Path("checkpoints/demo")
    # When "auto", a replica with a share of a GPU uses the GPU, and others the CPU; "cpu" and "cuda" force one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # When "auto", the backbone's weights keep the checkpoint's dtype; otherwise they are converted at load. Experts
    # always compute in the backbone's dtype.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # When "auto", checkpoints with copies of the experts are routed by organ, and partitioned ones flat, as released.
    routing: Literal["auto", "organs", "flat"] = "auto"
    # When a request's organ is unknown, this one is used, and the response reports it.
    default_organ: str = "breast"
    # When a caller names more organs than this, the request is refused.
    max_organs_per_request: PositiveInt = 2
    # When a replica has many cores and more torch threads make it faster, raise it.
    torch_threads: PositiveInt = 1


class TLSSection(Section):
    """Certificates for a server. All three paths are PEM files."""

    # When clients come from other machines, give the server's certificate chain and its key.
    certificate: Path
    key: Path
    # When clients must authenticate with certificates, give the authority that signed them.
    client_authority: Path | None = None


class DecodersSection(Section):
    """The processes of a gateway that decode images, and the limits for one file. A file over a limit is refused."""

    # When many images arrive at once and cores are free, raise it: the number of files that are decoded in parallel.
    processes: PositiveInt = 2
    # When valid files are refused for their CPU time, raise it (seconds). A hostile file can block a decoder for this
    # long.
    max_cpu_s: PositiveFloat = 10.0
    # When valid files are refused for the memory that decoding takes, raise it (bytes for each process).
    max_memory_bytes: Annotated[int, Field(ge=64 * 1024 * 1024)] = 1024 * 1024 * 1024


class QuotaSection(Section):
    """The quota of one caller on each gateway replica. A field that is not set does not limit, except as its comment
    says.
    """

    # When one caller should have fewer concurrent requests, set a number. In any case the last sixteenth of
    # gateway.max_requests is reserved for callers without a running request.
    concurrent: Quota | None = None
    # When one caller should send fewer requests, set how many a minute (a token bucket of that size).
    requests_per_minute: Quota | None = None
    # When one caller should compute less, set how many tokens a minute, prompts and answers together. A request is
    # admitted while any are left; what it takes beyond them is deducted from the following minutes.
    tokens_per_minute: Quota | None = None


class GatewaySection(Section):
    """The public gRPC server: what it listens on, and the limits of a request."""

    # When other machines call, listen on an address of their network; without TLS only loopback is allowed.
    host: str = "127.0.0.1"
    # When the port is in use, choose another; with 0 the system chooses one and prints it.
    port: Port = 50051
    # When set, the server speaks TLS only.
    tls: TLSSection | None = None
    # When set, a call must carry "authorization: Bearer <token>" with one of the lines of this file.
    token_file: Path | None = None
    # When more requests than this are running at once, further ones end RESOURCE_EXHAUSTED with a retry hint.
    max_requests: PositiveInt = 64
    # When a request has more images, it is refused.
    max_images: PositiveInt = 8
    # When one image file has more bytes, it is refused.
    max_image_bytes: PositiveInt = 64 * 1024 * 1024
    # When an image, or all sampled frames of a cine loop, have more pixels, it is refused before decoding.
    max_image_pixels: PositiveInt = 40_000_000
    # When you need the text around the image of a DICOM file, set it to false. With true only the box around its
    # ultrasound regions is used, which removes most burned-in text, including patient names.
    crop_to_regions: bool = True
    # When a cine loop has more frames, this many are sampled evenly; the model encodes them in pairs.
    max_frames: Annotated[int, Field(ge=2)] = 8
    # When an image, or two frames of a cine loop, would take more visual tokens, they are scaled down to fit, also
    # below the minimum of the checkpoint's preprocessor_config.json.
    max_visual_tokens: Annotated[int, Field(ge=16)] = 196
    # When a request does not set max_new_tokens, this many.
    default_new_tokens: PositiveInt = 256
    # When a call has no deadline, this one, in seconds.
    default_deadline_s: PositiveFloat = 300.0
    # When answers that callers do not read should leave memory sooner, lower it: the age of a connection, in seconds,
    # at which the server has the client reconnect. Calls on the old connection continue for default_deadline_s or
    # router.max_request_s, whichever is longer. Then the connection ends.
    max_connection_s: PositiveFloat = 3600.0
    # When all files of a request together have more bytes, it is refused before it is read.
    max_request_bytes: PositiveInt = 64 * 1024 * 1024
    # When many large requests come at once and are refused although there is memory, raise it. Half of it is for
    # arriving requests, each counted as max_request_bytes, and half for those that are being decoded.
    max_received_bytes: PositiveInt = 1024 * 1024 * 1024
    # When callers may learn of each other's prompts through timing, set "all": then all callers share the prefix cache.
    # With "token" only requests with the same bearer token share it, so that the time to the first token reveals
    # nothing about other callers. Callers without credentials always share it.
    share_caches: Literal["token", "all"] = "token"
    # When callers should be limited, set the quota of each. A caller is a bearer token, or a client certificate.
    quota: QuotaSection = QuotaSection()
    # When some callers need another quota, set it by name: the name after the token in the token file, or the
    # certificate's name.
    quotas: dict[str, QuotaSection] = {}
    decoders: DecodersSection = DecodersSection()
    resources: Resources = Resources()


class VisionSection(Section):
    """The vision encoder."""

    # When the same images are sent repeatedly, raise it: bytes of the cache of embeddings.
    cache_bytes: Annotated[int, Field(ge=0)] = 64 * 1024 * 1024
    # When many requests arrive at once, up to this many patches are encoded in one forward pass.
    max_batch_patches: PositiveInt = 16_384
    # When more inputs than this wait, further ones end RESOURCE_EXHAUSTED.
    max_queue: PositiveInt = 128
    resources: Resources = Resources()


class RouterSection(Section):
    """The language backbone, its KV cache, its batch, and its streams to the expert groups."""

    # When more requests should run in one batch, raise it; each step then takes longer.
    max_batch_size: PositiveInt = 32
    # When more requests than this wait for the batch, further ones end RESOURCE_EXHAUSTED.
    max_queue: PositiveInt = 128
    # When a prompt has more tokens, visual ones included, it is refused. It must allow all images within
    # gateway.max_images, max_frames and max_visual_tokens, and 512 tokens of text.
    max_prompt_tokens: PositiveInt = 8192
    # When a request asks for more new tokens, it is refused.
    max_new_tokens: PositiveInt = 1024
    # When requests wait although the batch is not full, raise it: the number of tokens in the KV cache.
    kv_cache_tokens: PositiveInt = 32_768
    # When long prompts stall decoding requests, lower it: prompt tokens computed per step, at least the 16 of a block.
    max_prefill_tokens: Annotated[int, Field(ge=16)] = 512
    # When expert calls take longer than the dense MLP and the shared expert (slow network, fast GPU), set it to 2: each
    # step is computed in two halves, and the experts of one half overlap with the attention of the other.
    micro_batches: Literal[1, 2] = 1
    # When shared prefixes of prompts (instructions, images) should not be cached, set it to false. With true, blocks of
    # finished requests stay in the KV cache until other requests need them.
    prefix_reuse: bool = True
    # When a request for logits (tests and evaluation) takes more bytes, it is refused.
    max_logits_bytes: PositiveInt = 64 * 1024 * 1024
    # When a request runs longer than this, in seconds, it ends, even if its deadline is later.
    max_request_s: PositiveFloat = 3600.0
    # When an expert call takes longer, in seconds, the replica counts as lost and the call is retried on another one.
    exchange_timeout_s: PositiveFloat = 10.0
    # When expert replicas run on the router's machine and large calls should use shared memory, raise it (bytes in
    # all). Calls that do not fit are sent in messages. 0 disables shared memory.
    shared_memory_bytes: Annotated[int, Field(ge=0, le=2**36)] = 256 * 1024 * 1024
    # When the experts should run in the router's process (to compare, or if all fit on one GPU), set "local".
    experts: Literal["remote", "local"] = "remote"
    resources: Resources = Resources()


class ExpertsSection(Section):
    """The expert groups, one Serve application per organ."""

    # When an organ gets more traffic than others, or its replicas need a GPU, name it under `organs`.
    resources: Resources = Resources()
    # When an organ needs other resources than the ones above, set them here.
    organs: dict[str, Resources] = {}
    # When you compare kernels or wrote one, set its name. "auto" is the packed kernel on a CPU, and measures on a GPU.
    kernel: str = "auto"
    # When only bundles in the backbone's dtype may load, set "refuse". With "convert" other weights are converted at
    # load, and `echoray status` shows the original dtype.
    other_dtype: Literal["convert", "refuse"] = "convert"
    # When loading a bundle would take a replica's weights above this many bytes, the load is refused.
    max_resident_bytes: PositiveInt = 16 * 1024**3
    # When several machines share a registry of bundles, set its folder or a URL like s3://bucket/experts. The
    # checkpoint's registry/ folder is read in addition.
    registry: str | None = None
    # When the registry's file system needs settings, set fsspec's options, like endpoint_url for your own S3. Put
    # credentials in the environment (AWS_ACCESS_KEY_ID and so on).
    registry_options: dict[str, str | int | bool] = {}
    # When fetched bundles fill the disk of a machine, lower it; the least recently used files are evicted first.
    registry_cache_bytes: PositiveInt = 64 * 1024**3
    # When the local copies of the bundles in use, up to three per organ, must be on another disk, set a folder. With
    # them replicas and the whole system can restart while the registry is unavailable. When unset, the folder is next
    # to the rollouts' database.
    kept_bundles: Path | None = None
    # When only bundles that one of your keys signed may load, set "required".
    signatures: Literal["optional", "required"] = "optional"
    # When bundles are signed, set the public keys (PEM files); every signature must then be by one of them.
    public_keys: tuple[Path, ...] = ()
    # When more calls than this wait in one replica, further ones are refused, and the router retries them.
    max_queue: PositiveInt = 1024
    # When the experts should get more CPU time than other programs, lower it (0 to 19, as for the command nice). On few
    # cores the router, for which every request waits, takes precedence over the experts.
    niceness: Annotated[int, Field(ge=0, le=19)] = 5

    def resources_of(self, organ: str) -> Resources:
        """The resources of one organ's group."""
        return self.organs.get(organ, self.resources)


class ControlSection(Section):
    """Control: the list of live expert versions, and the status of the system."""

    # When operators work from other machines, listen on an address of their network; without TLS only loopback is
    # allowed.
    host: str = "127.0.0.1"
    # When the port is in use, choose another; with 0 the system chooses one.
    port: Port = 50052
    # When set, the server speaks TLS only.
    tls: TLSSection | None = None
    # When set, a call must carry "authorization: Bearer <token>" with one of the lines of this file.
    token_file: Path | None = None
    # When pushes over a slow line are cut off, raise it: seconds without a further piece of the bundle, or with less
    # than 64 KiB of it.
    push_idle_s: PositiveFloat = 30.0
    # When Ray cannot place Control, lower it. There is always one replica, because it is the only writer of the live
    # set.
    num_cpus: NonNegativeFloat = 0.1
    # When rollouts must proceed on a busy machine, lower it (0 to 19, as for the command nice). On few cores the parts
    # that answer requests take precedence over Control.
    niceness: Annotated[int, Field(ge=0, le=19)] = 10


class RolloutsSection(Section, RolloutSettings):
    """How an organ's experts are replaced; the other fields are in `router.rollouts.settings`."""

    # When unset, a file in the checkpoint's folder, or in your state folder if that is not writable. In a cluster of
    # several machines set a PostgreSQL URL, postgresql://user@host/name, with the password in PGPASSWORD.
    database: str | None = None
    # When a pushed bundle is larger, it is refused before its first file.
    max_push_bytes: PositiveInt = 64 * 1024**3
    # When verifying a valid bundle runs out of memory, raise it: bytes in addition to the bundle's files.
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
    # When a replica answers health checks slowly under load, raise it (seconds).
    health_check_timeout_s: PositiveFloat = 10.0
    # When requests take long and should finish before a replica stops, raise it (seconds).
    graceful_shutdown_timeout_s: NonNegativeFloat = 20.0
    # When the object store is too large for the machine, lower it; no tensors are stored in it.
    object_store_bytes: Annotated[int, Field(ge=78_643_200)] = 128 * 1024 * 1024
    # When Prometheus needs a fixed port for the metrics, set it; with 0 the system chooses one and prints it. They need
    # no credentials: protect the port with a firewall. On an existing cluster, set it with `ray start
    # --metrics-export-port`.
    metrics_port: Port = 0
    # When "auto", the parts use loopback on one machine and the nodes' addresses in a cluster. When a cluster of one
    # node will grow, set "node". This traffic is not encrypted, so the network must be private.
    internal_network: Literal["auto", "loopback", "node"] = "auto"
    # When a newer grpcio is faster with its event engine, set it to true.
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
        check_consistency(self)
        return self
