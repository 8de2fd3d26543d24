"""A rollout in a file: the version, the steps, and the thresholds."""

import re
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from experts.bundles.digest import digest_of
from router.rollouts.gates import Gate
from router.rollouts.settings import RolloutPlan, Step, Thresholds

DIGEST = re.compile(r"[0-9a-f]{64}")


class RolloutFile(BaseModel):
    """The contents of a rollout file. Applying it again changes nothing; a changed file is another rollout."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # The organ whose experts are replaced, or a new organ.
    organ: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
    # When the bundle is known by its version in the registry, name it here; otherwise give its digest.
    version: str | None = None
    digest: Annotated[str, Field(pattern=f"^{DIGEST.pattern}$")] | None = None
    # When empty, the candidate becomes stable as soon as it is warm, or waits for an operator if promote is false.
    steps: tuple[Step, ...] = ()
    # When not empty, the candidate must pass these evaluations before the first step, and before it becomes stable.
    gates: tuple[Gate, ...] = ()
    # When false, the rollout stays at its last step until an operator promotes it.
    promote: bool = True
    # When unset, the controller's setting.
    thresholds: Thresholds | None = None
    # When unset, the controller's setting.
    warm_timeout_s: PositiveFloat | None = None
    # When unset, the controller's setting.
    watch_after_promotion_s: Annotated[float, Field(ge=0)] | None = None
    # The reason for the history.
    reason: Annotated[str, Field(max_length=500)] = ""
    # When a rollout failed or was rolled back and the same file should be tried again, raise it.
    attempt: PositiveInt = 1

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.version is None) == (self.digest is None):
            raise ValueError("give either the bundle's version or its digest, and not both")
        if others := {gate.organ for gate in self.gates} - {self.organ}:
            raise ValueError(f"gates are about the rollout's organ, {self.organ}, and not about {sorted(others)[0]}")
        # The plan has validators of its own.
        _ = self.plan
        return self

    @property
    def plan(self) -> RolloutPlan:
        """The rollout's automatic steps."""
        return RolloutPlan(
            steps=self.steps,
            gates=self.gates,
            promote=self.promote,
            thresholds=self.thresholds,
            warm_timeout_s=self.warm_timeout_s,
            watch_after_promotion_s=self.watch_after_promotion_s,
        )

    def identity(self, digest: str) -> str:
        """The file's identity: SHA-256 over its contents, with the bundle's digest in place of its version."""
        contents = self.model_dump(mode="json", exclude={"version"})
        # Fields of later releases: when unset, they must not change the identity of older files.
        later: list[tuple[dict[str, Any], str, Any]] = [(contents, "watch_after_promotion_s", None)]
        later += [(contents, "gates", [])]
        later += [(step, "min_successes", None) for step in contents["steps"]]
        if self.thresholds is not None:
            later.append((contents["thresholds"], "min_successes", Thresholds().min_successes))
        for part, name, unset in later:
            if part[name] == unset:
                del part[name]
        return digest_of({**contents, "digest": digest})
