"""The settings of an evaluation. Answers are kept by the digest of what decides them."""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field

from echovlm_ray.config import PositiveFloat, PositiveInt, Section


class AskSettings(Section):
    """How questions are asked. Every field changes what is answered."""

    # When answers are cut off, raise it; greedy decoding stops by itself at an answer's end.
    max_new_tokens: PositiveInt = 256
    # When you want to know how well the experts answer, whatever the organ gate finds, "given" names each record's
    # organ to the service; "found" lets the service find it, as callers do.
    organs: Literal["found", "given"] = "found"


class ScoreSettings(Section):
    """How answers are scored. Nothing here needs an answer to be asked for again."""

    # When intervals are too coarse, raise it: resamples of a bootstrap.
    draws: Annotated[int, Field(ge=100)] = 1000
    # When you repeat an evaluation, keep it: it decides the resamples, and which images are exchanged.
    seed: Annotated[int, Field(ge=0)] = 0


class RequestLimits(Section):
    """How long a service is waited for. Nothing here changes an answer."""

    # When the service has room for more, raise it: requests under way at once.
    concurrency: PositiveInt = 8
    # When one answer takes longer, in seconds, it is asked for again, three times in all.
    timeout_s: PositiveFloat = 300.0
    # When the service is away, or full, for longer, the evaluation ends, and can be resumed.
    retry_s: PositiveFloat = 600.0


class Target(Section):
    """Which model answers: what identifies it, not where it runs."""

    name: str
    version: str
    backbone_digest: str
    expert_set_id: str
    # organ → version of its bundle.
    organs: dict[str, str]


def settings_digest(target: Target, asking: AskSettings, seed: int) -> str:
    """The identity of a run: the same model, asked in the same way.

    Args:
        target: the model; its names play no part.
        asking: how it is asked.
        seed: decides which images are exchanged in a baseline.
    """
    content = {
        "backbone": target.backbone_digest,
        "experts": target.expert_set_id,
        "asking": asking.model_dump(),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
