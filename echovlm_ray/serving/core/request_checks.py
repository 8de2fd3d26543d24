"""Checks a `GenerateRequest` field by field before anything is decoded."""

import re

from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.sampling_ranges import REPETITION_PENALTIES, TEMPERATURES, TOP_P, format_range, in_range
from echovlm_ray.serving.core.request import GenerateRequest, SamplingOptions
from protos import echovlm_pb2, router_pb2

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_ORGANS = 16
MAX_ORGAN_CHARACTERS = 64
MAX_SESSION_KEY_CHARACTERS = 256
# Far above the average of a token, so that a prompt can be refused before it is tokenized.
PROMPT_CHARACTERS_PER_TOKEN = 32


_SHA_256 = re.compile(r"[0-9a-f]{64}")


def check_request(request: GenerateRequest, gateway: GatewaySection, router: RouterSection) -> None:
    """Checks everything but the content of the images.

    Raises:
        InvalidRequestError: names the first invalid field, the problem and the allowed values.
    """
    _check_prompt(request, router)
    _check_images(request, gateway)
    _check_strings(request)
    check_sampling(request.sampling)
    check_session_key(request.session_key)
    check_expert_set_id(request.expert_set_id, may_be_empty=True)
    if request.prompt_digest and not _SHA_256.fullmatch(request.prompt_digest):
        raise InvalidRequestError("prompt_digest", "must be 64 lower-case hexadecimal digits, as an answer has it")
    if request.max_new_tokens > router.max_new_tokens:
        raise InvalidRequestError(
            "max_new_tokens",
            f"is {request.max_new_tokens} and the limit is {router.max_new_tokens} (router.max_new_tokens): ask for "
            "fewer, or for 0 to take the default",
        )


def check_sampling(sampling: router_pb2.Sampling | SamplingOptions) -> None:
    """Checks the sampling parameters, so that their combinations cannot overflow in float32.

    Raises:
        InvalidRequestError: one is out of range; the text has the range.
    """
    temperature, penalty = sampling.temperature, sampling.repetition_penalty
    if not (temperature == 0 or in_range(temperature, TEMPERATURES)):
        raise InvalidRequestError("sampling.temperature", f"must be 0 (greedy) or {format_range(TEMPERATURES)}")
    if not (sampling.top_p == 0 or in_range(sampling.top_p, TOP_P)):
        raise InvalidRequestError("sampling.top_p", f"must be 0 or {format_range(TOP_P)}; 0 and 1 keep all tokens")
    if not (penalty == 0 or in_range(penalty, REPETITION_PENALTIES)):
        raise InvalidRequestError(
            "sampling.repetition_penalty", f"must be 0 or {format_range(REPETITION_PENALTIES)}; 0 and 1 change nothing"
        )


def check_session_key(session_key: str) -> None:
    """Checks the length of a session key.

    Raises:
        InvalidRequestError: it is too long.
    """
    if len(session_key) > MAX_SESSION_KEY_CHARACTERS:
        raise InvalidRequestError(
            "session_key",
            f"has {len(session_key)} characters; at most {MAX_SESSION_KEY_CHARACTERS} are allowed: send a digest of it",
        )


def check_expert_set_id(expert_set_id: str, *, may_be_empty: bool = False) -> None:
    """Checks the format of an expert set's id.

    Raises:
        InvalidRequestError: it is not the 64 hexadecimal digits of a SHA-256.
    """
    if may_be_empty and not expert_set_id:
        return
    if not _SHA_256.fullmatch(expert_set_id):
        raise InvalidRequestError(
            "expert_set_id", "must be 64 lower-case hexadecimal digits: the whole id, as `generate --json` shows it"
        )


def _check_prompt(request: GenerateRequest, router: RouterSection) -> None:
    if request.task.needs_prompt and not request.prompt.strip():
        if request.task.value == echovlm_pb2.TASK_UNSPECIFIED:
            raise InvalidRequestError("task", "is not set and there is no prompt either; set a task, or write a prompt")
        raise InvalidRequestError("prompt", f"is empty; {request.task.label} needs a question")
    limit = router.max_prompt_tokens * PROMPT_CHARACTERS_PER_TOKEN
    if len(request.prompt) > limit:
        raise InvalidRequestError(
            "prompt",
            f"has {len(request.prompt)} characters, which cannot fit into {router.max_prompt_tokens} tokens "
            "(router.max_prompt_tokens): shorten it",
        )


def _check_images(request: GenerateRequest, gateway: GatewaySection) -> None:
    if len(request.images) > gateway.max_images:
        raise InvalidRequestError(
            "images",
            f"has {len(request.images)} files and the limit is {gateway.max_images} (gateway.max_images)",
        )
    if request.task.needs_image and not len(request.images):
        raise InvalidRequestError("images", f"is empty; {request.task.label} needs at least one image")


def _check_strings(request: GenerateRequest) -> None:
    if len(request.stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError("stop", f"has {len(request.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
    for index, string in enumerate(request.stop):
        if not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            raise InvalidRequestError(
                f"stop[{index}]", f"has {len(string)} characters; it must have 1 to {MAX_STOP_CHARACTERS}"
            )
    if len(request.organs) > MAX_ORGANS:
        raise InvalidRequestError("organs", f"has {len(request.organs)} names; at most {MAX_ORGANS} are allowed")
    for index, organ in enumerate(request.organs):
        if not 1 <= len(organ) <= MAX_ORGAN_CHARACTERS:
            raise InvalidRequestError(
                f"organs[{index}]", f"has {len(organ)} characters; it must have 1 to {MAX_ORGAN_CHARACTERS}"
            )
