"""The settings of an evaluation. Answers are stored under the digest of the settings that affect them."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field

from echovlm_ray.config import PositiveFloat, PositiveInt, Section


class AskSettings(Section):
    """The settings of requests. Every field affects the answers."""

    # Raise it when answers are cut off; greedy decoding stops at an answer's end anyway.
    max_new_tokens: PositiveInt = 256
    # When you evaluate the experts independently of the organ gate, "given" sends each record's organ; with "found" the
    # service determines it, as for most callers.
    organs: Literal["found", "given"] = "found"


class ScoreSettings(Section):
    """The settings of scoring, which do not affect the answers."""

    # When intervals are too coarse, raise it: resamples of a bootstrap.
    draws: Annotated[int, Field(ge=100)] = 1000
    # When you repeat an evaluation, keep it: the seed of the resamples, and of the exchanged images.
    seed: Annotated[int, Field(ge=0)] = 0


class RequestLimits(Section):
    """The limits of requests, which do not affect the answers."""

    # When the service has more capacity, raise it: concurrent requests.
    concurrency: PositiveInt = 8
    # When one answer takes longer, in seconds, it is retried, three times in total.
    timeout_s: PositiveFloat = 300.0
    # When the service is unavailable or overloaded for longer, in seconds, the evaluation ends, and can be resumed.
    retry_s: PositiveFloat = 600.0


class Target(Section):
    """The identity of the evaluated model."""

    name: str
    version: str
    backbone_digest: str
    expert_set_id: str
    # organ → version of its bundle.
    organs: dict[str, str]


def settings_digest(target: Target, asking: AskSettings, seed: int) -> str:
    """The identity of a run: model and request settings.

    Args:
        target: the model; its names play no part.
        asking: the request settings.
        seed: decides which images are exchanged in a baseline.
    """
    content = {
        "backbone": target.backbone_digest,
        "experts": target.expert_set_id,
        "asking": asking.model_dump(),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
