"""The settings of rollouts: thresholds, automatic steps, and the controller's time limits."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from router.rollouts.gates import Gate

Mode = Literal["canary", "shadow"]
Percent = Annotated[float, Field(gt=0, le=100)]


class Thresholds(BaseModel):
    """When a candidate is rolled back without being asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # When a step may end on fewer successful requests of the candidate, lower it; 0 lets time alone end a step.
    min_successes: Annotated[int, Field(ge=0)] = 20
    # When latency is noisy, raise it: with fewer requests beside the incumbent's nothing is said of latency.
    min_requests: PositiveInt = 20
    # When a candidate that fails this often may stay, raise it; 1 switches this off. From the first request on, a
    # sequential test compares this rate with the usual one: the incumbent's, or an eighth of this where that is less.
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.02
    # When more of its outputs are infinite or not a number, it is rolled back, however few requests there were.
    max_nonfinite: Annotated[int, Field(ge=0)] = 0
    # When its time per token is this many times the incumbent's, it is rolled back.
    max_latency_ratio: PositiveFloat = 1.5
    # When rare slow answers matter more than the usual ones, raise it: the quantile of time per token that is compared.
    latency_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    # When traffic is thin, lengthen it: what Routers reported within so many seconds counts for outputs that are not
    # finite, and for latency where that is enough. Failed requests count since the candidate first had traffic.
    window_s: PositiveFloat = 300.0


class Step(BaseModel):
    """One automatic step: a part of the traffic for a time."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # When answers of the candidate should not reach callers yet, set "shadow".
    mode: Mode = "canary"
    # When more requests should reach the candidate, raise it.
    percent: Percent
    # When the step should last longer before the next one, raise it (seconds).
    hold_s: Annotated[float, Field(ge=0)]
    # When unset, the thresholds' own: so many requests of the candidate must succeed before the step ends.
    min_successes: Annotated[int, Field(ge=0)] | None = None


class RolloutPlan(BaseModel):
    """What a rollout does by itself once its candidate is warm."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # When empty, an operator decides about traffic; otherwise these are taken one after another.
    steps: tuple[Step, ...] = ()
    # When not empty, the candidate must pass these evaluations before the first step, and before it becomes stable.
    gates: tuple[Gate, ...] = ()
    # When true, the candidate becomes stable after the last step without being asked.
    promote: bool = False
    # When unset, the controller's own thresholds at the time of staging.
    thresholds: Thresholds | None = None
    # When unset, the controller's own limit at the time of staging (seconds from verified to warm).
    warm_timeout_s: PositiveFloat | None = None
    # When unset, the controller's own at the time of staging (seconds).
    watch_after_promotion_s: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _percentages_rise(self) -> Self:
        canaries = [step.percent for step in self.steps if step.mode == "canary"]
        if canaries != sorted(canaries):
            raise ValueError(f"the canary steps must not fall, but their percentages are {canaries}")
        return self


class RolloutSettings(BaseModel):
    """How the controller works."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # When a rollout does not bring its own, these decide about automatic rollback.
    thresholds: Thresholds = Thresholds()
    # When faults show late, lengthen it; 0 switches this off. So many seconds after its promotion a version is still
    # judged, with the one before kept in memory beside it, and taken back in favour of that one when it fails.
    watch_after_promotion_s: Annotated[float, Field(ge=0)] = 600.0
    # When bundles are large or storage is slow, raise it: seconds for a candidate to be loaded on every replica.
    warm_timeout_s: PositiveFloat = 600.0
    # When bundles are large, or other programs leave Control's machine no rest, raise it: seconds after which a
    # candidate that is still being verified has failed. A check gets only processor time that is idle otherwise.
    verify_timeout_s: PositiveFloat = 600.0
    # When verifying a bundle took the whole process down this many times, the candidate has failed.
    max_verify_attempts: PositiveInt = 3
    # When more replicas than this were lost while they loaded the candidate, it has failed.
    max_replica_losses: Annotated[int, Field(ge=0)] = 2
    # When replicas take long to restart, raise it: so many seconds pass before the candidate is tried again.
    loss_pause_s: Annotated[float, Field(ge=0)] = 15.0
    # When the fleet should be looked at more often, lower it (seconds); every change wakes the controller anyway.
    period_s: PositiveFloat = 1.0
    # When replicas are slow to say what they hold, raise it (seconds).
    status_timeout_s: PositiveFloat = 2.0
    # When routers are slow to read the gates of a new version, raise it: seconds for which canary, shadow, promote,
    # rollback and retire wait until every router and gateway applies the change; then they name those that do not.
    take_up_timeout_s: PositiveFloat = 5.0
    # When many replicas should load at the same time, raise it: verifications, loads and unloads under way together.
    max_operations: PositiveInt = 32
    # When more people compute past answers again at one time, raise it: replays that are held or wait, together.
    max_replays: PositiveInt = 16
    # When a replayed answer takes long to load and to compute, raise it: seconds after which a replay releases its
    # experts in any case.
    max_replay_s: PositiveFloat = 600.0
    # When gates take too long and requests leave room, raise it: questions that an evaluation asks per second at most,
    # one at a time, and only while no request waits for a place in the batch.
    gate_questions_per_s: PositiveFloat = 1.0
    # When a gate's dataset is larger, raise it: records of the gate's organ that are asked at most.
    max_gate_records: PositiveInt = 2000
    # When a stable version is rolled back repeatedly to older ones, this many of them are remembered per organ.
    max_previous: PositiveInt = 10
