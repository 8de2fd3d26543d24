"""What a `GenerateRequest` must be, checked field by field before anything is decoded."""

import re
from dataclasses import dataclass

from echovlm_ray.config import GatewaySection, RouterSection
from echovlm_ray.errors import InvalidRequestError
from echovlm_ray.sampling_ranges import REPETITION_PENALTIES, TEMPERATURES, TOP_P, in_range, words
from echovlm_ray.tasks import TASKS, Language, Task, TaskName, language_of, task_of
from protos import echovlm_pb2, router_pb2

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_ORGANS = 16
MAX_ORGAN_CHARACTERS = 64
MAX_SESSION_KEY_CHARACTERS = 256
# Far above what a token takes on average, so that a prompt can be refused before it is cut into tokens.
PROMPT_CHARACTERS_PER_TOKEN = 32


_SHA_256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """What is asked, in the terms of `echovlm_ray.prompts`, defaults filled in."""

    task: TaskName
    language: Language
    prompt: str
    organs: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    session_key: str
    expert_set_id: str
    prompt_digest: str
    for_replay: bool


def check_request(
    request: echovlm_pb2.GenerateRequest, gateway: GatewaySection, router: RouterSection
) -> CheckedRequest:
    """Checks everything but the content of the images.

    Raises:
        InvalidRequestError: names the first field at fault, what is wrong with it and what is allowed.
    """
    task = task_of(request.task)
    if task is None:
        names = ", ".join(task.label for task in TASKS.values() if task.value != echovlm_pb2.TASK_UNSPECIFIED)
        raise InvalidRequestError("task", f"{request.task} is no task; use one of {names}, or a prompt alone")
    language = language_of(request.language)
    if language is None:
        raise InvalidRequestError(
            "language", f"{request.language} is no language; use LANGUAGE_ENGLISH or LANGUAGE_CHINESE"
        )
    _check_prompt(request, task, router)
    _check_images(request, task, gateway)
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
    return CheckedRequest(
        task=task.name,
        language=language,
        prompt=request.prompt,
        organs=tuple(request.organs),
        max_new_tokens=request.max_new_tokens or gateway.default_new_tokens,
        stop=tuple(request.stop),
        session_key=request.session_key,
        expert_set_id=request.expert_set_id,
        prompt_digest=request.prompt_digest,
        for_replay=request.for_replay,
    )


def check_sampling(sampling: router_pb2.Sampling) -> None:
    """Checks the numbers of a sampling request; what passes cannot overflow in float32, alone or together.

    Raises:
        InvalidRequestError: one is not in its range; the text names the range.
    """
    temperature, penalty = sampling.temperature, sampling.repetition_penalty
    if not (temperature == 0 or in_range(temperature, TEMPERATURES)):
        raise InvalidRequestError("sampling.temperature", f"must be 0 (greedy) or {words(TEMPERATURES)}")
    if not (sampling.top_p == 0 or in_range(sampling.top_p, TOP_P)):
        raise InvalidRequestError("sampling.top_p", f"must be 0 or {words(TOP_P)}; 0 and 1 keep all tokens")
    if not (penalty == 0 or in_range(penalty, REPETITION_PENALTIES)):
        raise InvalidRequestError(
            "sampling.repetition_penalty", f"must be 0 or {words(REPETITION_PENALTIES)}; 0 and 1 change nothing"
        )


def check_session_key(session_key: str) -> None:
    """Refuses a key that is no key but a document.

    Raises:
        InvalidRequestError: it is too long.
    """
    if len(session_key) > MAX_SESSION_KEY_CHARACTERS:
        raise InvalidRequestError(
            "session_key",
            f"has {len(session_key)} characters; at most {MAX_SESSION_KEY_CHARACTERS} are allowed: send a digest of it",
        )


def check_expert_set_id(expert_set_id: str, *, may_be_empty: bool = False) -> None:
    """Refuses what cannot be a set's id.

    Raises:
        InvalidRequestError: it is not the 64 hexadecimal digits of a SHA-256.
    """
    if may_be_empty and not expert_set_id:
        return
    if not _SHA_256.fullmatch(expert_set_id):
        raise InvalidRequestError(
            "expert_set_id", "must be 64 lower-case hexadecimal digits: the whole id, as `generate --json` shows it"
        )


def _check_prompt(request: echovlm_pb2.GenerateRequest, task: Task, router: RouterSection) -> None:
    if task.needs_prompt and not request.prompt.strip():
        if task.value == echovlm_pb2.TASK_UNSPECIFIED:
            raise InvalidRequestError("task", "is not set and there is no prompt either; set a task, or write a prompt")
        raise InvalidRequestError("prompt", f"is empty; {task.label} needs a question")
    limit = router.max_prompt_tokens * PROMPT_CHARACTERS_PER_TOKEN
    if len(request.prompt) > limit:
        raise InvalidRequestError(
            "prompt",
            f"has {len(request.prompt)} characters, which cannot fit into {router.max_prompt_tokens} tokens "
            "(router.max_prompt_tokens): shorten it",
        )


def _check_images(request: echovlm_pb2.GenerateRequest, task: Task, gateway: GatewaySection) -> None:
    if len(request.images) > gateway.max_images:
        raise InvalidRequestError(
            "images",
            f"has {len(request.images)} files and the limit is {gateway.max_images} (gateway.max_images)",
        )
    if task.needs_image and not request.images:
        raise InvalidRequestError("images", f"is empty; {task.label} needs at least one image")


def _check_strings(request: echovlm_pb2.GenerateRequest) -> None:
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
