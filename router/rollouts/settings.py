"""The settings of rollouts: thresholds, automatic steps, and the controller's timeouts."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from router.rollouts.gates import Gate

Mode = Literal["canary", "shadow"]
Percent = Annotated[float, Field(gt=0, le=100)]


class Thresholds(BaseModel):
    """When a candidate is rolled back automatically."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # When a step may end with fewer successful requests of the candidate, lower it; with 0 a step ends by time alone.
    min_successes: Annotated[int, Field(ge=0)] = 20
    # When latency is noisy, raise it: with fewer requests concurrent to the incumbent's, latency is not judged.
    min_requests: PositiveInt = 20
    # When a candidate that fails this often may stay, raise it; 1 disables it. From the first request on, a sequential
    # test compares this rate with the incumbent's, or with an eighth of this rate if the incumbent's is lower.
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.02
    # When more outputs of the candidate contain NaN or infinity, it is rolled back, even after few requests.
    max_nonfinite: Annotated[int, Field(ge=0)] = 0
    # When the candidate's time per token is this many times the incumbent's, it is rolled back.
    max_latency_ratio: PositiveFloat = 1.5
    # When rare slow answers matter most, raise it: the quantile of the time per token that is compared.
    latency_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    # When traffic is low, raise it: the window in seconds for outputs with NaN or infinity, and for latency if it has
    # enough requests. Failed requests count since the candidate first had traffic.
    window_s: PositiveFloat = 300.0


class Step(BaseModel):
    """One automatic step: a share of the traffic for a time."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # When the candidate's answers must not reach callers yet, set "shadow".
    mode: Mode = "canary"
    # When more requests should reach the candidate, raise it.
    percent: Percent
    # When the step should last longer before the next one, raise it (seconds).
    hold_s: Annotated[float, Field(ge=0)]
    # When unset, the thresholds' min_successes: successful requests of the candidate before the step ends.
    min_successes: Annotated[int, Field(ge=0)] | None = None


class RolloutPlan(BaseModel):
    """The automatic part of a rollout, once its candidate is warm."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # When empty, an operator decides about traffic; otherwise these steps run one after another.
    steps: tuple[Step, ...] = ()
    # When not empty, the candidate must pass these evaluations before the first step, and before it becomes stable.
    gates: tuple[Gate, ...] = ()
    # When true, the candidate becomes stable after the last step automatically.
    promote: bool = False
    # When unset, the controller's thresholds at the time of staging.
    thresholds: Thresholds | None = None
    # When unset, the controller's timeout at the time of staging (seconds from verified to warm).
    warm_timeout_s: PositiveFloat | None = None
    # When unset, the controller's setting at the time of staging (seconds).
    watch_after_promotion_s: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _percentages_rise(self) -> Self:
        canaries = [step.percent for step in self.steps if step.mode == "canary"]
        if canaries != sorted(canaries):
            raise ValueError(f"the canary steps must not fall, but their percentages are {canaries}")
        return self


class RolloutSettings(BaseModel):
    """The controller's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # When a rollout sets no thresholds, these decide about automatic rollback.
    thresholds: Thresholds = Thresholds()
    # When faults show late, raise it; 0 disables it. For this many seconds after its promotion a version is still
    # judged, and the previous one stays in memory; a version that fails is rolled back to that one.
    watch_after_promotion_s: Annotated[float, Field(ge=0)] = 600.0
    # When bundles are large or storage is slow, raise it: seconds for loading a candidate on every replica.
    warm_timeout_s: PositiveFloat = 600.0
    # When bundles are large or Control's machine is busy, raise it: the timeout of a verification in seconds. A
    # verification only uses idle CPU time.
    verify_timeout_s: PositiveFloat = 600.0
    # When verifying a bundle has crashed the whole process this many times, the candidate has failed.
    max_verify_attempts: PositiveInt = 3
    # When more replicas than this have died while they loaded the candidate, it has failed.
    max_replica_losses: Annotated[int, Field(ge=0)] = 2
    # When replicas take long to restart, raise it: seconds before the candidate is loaded again.
    loss_pause_s: Annotated[float, Field(ge=0)] = 15.0
    # When replicas should be polled more often, lower it (seconds); every change wakes the controller anyway.
    period_s: PositiveFloat = 1.0
    # When replicas report their status slowly, raise it (seconds).
    status_timeout_s: PositiveFloat = 2.0
    # When routers are slow to load the gate rows of a new version, raise it: seconds for which canary, shadow, promote,
    # rollback and retire wait until every router and gateway applies the change. After that they list those that do
    # not.
    take_up_timeout_s: PositiveFloat = 5.0
    # When many replicas should load at the same time, raise it: concurrent verifications, loads and unloads.
    max_operations: PositiveInt = 32
    # When more people replay past answers at the same time, raise it: running and waiting replays together.
    max_replays: PositiveInt = 16
    # When a replay takes long to load and to compute, raise it: seconds after which it releases its experts in any
    # case.
    max_replay_s: PositiveFloat = 600.0
    # When gates take too long and there is capacity, raise it: the most questions per second of an evaluation. They are
    # sent one at a time, and only while no request waits for the batch.
    gate_questions_per_s: PositiveFloat = 1.0
    # When a gate's dataset is larger, raise it: the most records of the gate's organ that are evaluated.
    max_gate_records: PositiveInt = 2000
    # When a stable version may be rolled back several times, set how many earlier versions of an organ are stored.
    max_previous: PositiveInt = 10
