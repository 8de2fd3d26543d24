"""Checks that the fields of a configuration do not contradict each other."""

from typing import TYPE_CHECKING

from echovlm_ray.hosts import is_loopback

if TYPE_CHECKING:
    from echovlm_ray.config import Config

# Constants of Qwen2-VL: frames are encoded in pairs; a token is 2 × 2 patches of two frames with 14 × 14 pixels of 3
# colours in float32; two control tokens enclose each picture.
FRAMES_PER_TOKEN = 2
PATCHES_PER_TOKEN = 4
PATCH_BYTES = 2 * 14 * 14 * 3 * 4
TOKENS_AROUND_PICTURE = 2
# Reserved for a prompt's text: the instructions of a task, and a question.
TEXT_TOKENS = 512
# The largest payloads of a message between two parts, and of a request to the gateway.
MAX_INTERNAL_BYTES = 255 * 1024 * 1024
MAX_REQUEST_BYTES = 2**31 - 2 * 1024 * 1024


class ContradictionError(ValueError):
    """Two fields contradict each other. The text names both and the possible fixes."""

    def __init__(self, message: str, *fields: str) -> None:
        """`fields` are the dotted paths of the fields, the most likely cause first."""
        super().__init__(message)
        self.fields = fields


def check_consistency(config: "Config") -> None:
    """Checks all pairs of fields that can contradict each other.

    Raises:
        ContradictionError: two fields contradict each other.
    """
    _check_tokens(config)
    _check_pictures(config)
    _check_listeners(config)
    _check_quotas(config)
    _check_devices(config)
    _check_signatures(config)
    _check_dtypes(config)


def _check_tokens(config: "Config") -> None:
    if config.gateway.default_new_tokens > config.router.max_new_tokens:
        raise ContradictionError(
            f"gateway.default_new_tokens ({config.gateway.default_new_tokens}) is above router.max_new_tokens "
            f"({config.router.max_new_tokens}): lower the first or raise the second",
            "gateway.default_new_tokens",
            "router.max_new_tokens",
        )
    if config.router.max_prompt_tokens + config.router.max_new_tokens > config.router.kv_cache_tokens:
        raise ContradictionError(
            f"router.kv_cache_tokens ({config.router.kv_cache_tokens}) cannot hold even one longest request "
            f"(max_prompt_tokens {config.router.max_prompt_tokens} + max_new_tokens {config.router.max_new_tokens}): "
            "raise it or lower those",
            "router.kv_cache_tokens",
            "router.max_prompt_tokens",
            "router.max_new_tokens",
        )


def _check_pictures(config: "Config") -> None:
    """What the gateway's limits allow must pass the parts behind it."""
    gateway = config.gateway
    pairs = -(-gateway.max_frames // FRAMES_PER_TOKEN)
    loop_tokens = pairs * gateway.max_visual_tokens
    tokens = gateway.max_images * (loop_tokens + TOKENS_AROUND_PICTURE) + TEXT_TOKENS
    if tokens > config.router.max_prompt_tokens:
        raise ContradictionError(
            f"router.max_prompt_tokens ({config.router.max_prompt_tokens}) cannot hold what the gateway allows: "
            f"{gateway.max_images} cine loops (gateway.max_images) of {pairs} pairs of frames (gateway.max_frames "
            f"{gateway.max_frames}) at {gateway.max_visual_tokens} tokens (gateway.max_visual_tokens), and "
            f"{TEXT_TOKENS} of text, are {tokens}: raise the first or lower one of the others",
            "router.max_prompt_tokens",
            "gateway.max_images",
            "gateway.max_frames",
            "gateway.max_visual_tokens",
        )
    if loop_tokens * PATCHES_PER_TOKEN > config.vision.max_batch_patches:
        raise ContradictionError(
            f"vision.max_batch_patches ({config.vision.max_batch_patches}) cannot hold one cine loop of {pairs} "
            f"pairs of frames (gateway.max_frames {gateway.max_frames}) at {gateway.max_visual_tokens} visual "
            f"tokens (gateway.max_visual_tokens), {loop_tokens * PATCHES_PER_TOKEN} patches: raise the first or "
            "lower one of the others",
            "vision.max_batch_patches",
            "gateway.max_frames",
            "gateway.max_visual_tokens",
        )
    if gateway.max_images > config.vision.max_queue:
        raise ContradictionError(
            f"vision.max_queue ({config.vision.max_queue}) cannot hold the images of one request "
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


def _check_listeners(config: "Config") -> None:
    for name, server in (("gateway", config.gateway), ("control", config.control)):
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
    if config.gateway.port and config.gateway.port == config.control.port:
        raise ContradictionError(
            f"gateway.port and control.port are both {config.gateway.port}: change one",
            "control.port",
            "gateway.port",
        )


def _check_quotas(config: "Config") -> None:
    gateway = config.gateway
    known = gateway.token_file is not None or (gateway.tls is not None and gateway.tls.client_authority is not None)
    if not known and (gateway.quota != type(gateway.quota)() or gateway.quotas):
        raise ContradictionError(
            "gateway.quota and gateway.quotas go by callers, but callers show no credentials: set "
            "gateway.token_file or gateway.tls.client_authority",
            "gateway.quota",
            "gateway.token_file",
        )


def _check_signatures(config: "Config") -> None:
    if config.experts.signatures == "required" and not config.experts.public_keys:
        raise ContradictionError(
            'experts.signatures is "required" but experts.public_keys names no key, so no bundle could load: '
            'give the public keys, or set experts.signatures to "optional"',
            "experts.signatures",
            "experts.public_keys",
        )


def _check_dtypes(config: "Config") -> None:
    if config.experts.other_dtype == "refuse" and config.model.dtype != "auto":
        raise ContradictionError(
            f'model.dtype is "{config.model.dtype}", which converts all weights at load, but experts.other_dtype is '
            '"refuse", which lets none be converted: set model.dtype to "auto" or experts.other_dtype to "convert"',
            "experts.other_dtype",
            "model.dtype",
        )


def _check_devices(config: "Config") -> None:
    if config.model.device != "cuda":
        return
    parts = {
        "vision.resources": config.vision.resources,
        "router.resources": config.router.resources,
        "experts.resources": config.experts.resources,
    }
    parts |= {f"experts.organs.{organ}": resources for organ, resources in config.experts.organs.items()}
    if config.router.experts == "local":
        parts = {name: resources for name, resources in parts.items() if not name.startswith("experts.")}
    for name, resources in parts.items():
        if not resources.num_gpus:
            raise ContradictionError(
                f'model.device is "cuda" but {name}.num_gpus is 0, so Ray shows that part no GPU: '
                'give it a share of one, or set model.device to "auto"',
                f"{name}.num_gpus",
                "model.device",
            )
