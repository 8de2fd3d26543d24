"""What a check of a bundle takes and returns. `experts.checks.check` does it, in a process of its own."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from experts.bundles.manifest import Digest, DTypeName, OtherDtype
from experts.bundles.signing import SignaturePolicy, SignatureState
from experts.registry.source import BundleSource

DEFAULT_MEMORY_BYTES = 8 * 1024**3


class BackboneSizes(BaseModel):
    """What a bundle must fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: Digest
    num_layers: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]


class CheckRequest(BaseModel):
    """What to check, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: BundleSource
    # When given, a bundle of another organ is refused.
    organ: str | None = None
    # When given, a bundle for another backbone, or of sizes that do not fit it, is refused.
    backbone: BackboneSizes | None = None
    policy: SignaturePolicy = SignaturePolicy()
    kernel: str = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    # In which the backbone computes, and so the self-test; None is the bundle's own.
    dtype: DTypeName | None = None
    # "refuse" lets no bundle pass that would have to be converted.
    other_dtype: OtherDtype = "convert"
    # The most memory that checking may take beyond this process itself and the bundle's files, which are only mapped.
    # Not on a GPU, whose driver maps far more than it uses.
    memory_bytes: Annotated[int, Field(ge=1)] = DEFAULT_MEMORY_BYTES
    torch_threads: Annotated[int, Field(ge=1)] = 1


class CheckResult(BaseModel):
    """What was found. Fields are None where it did not get that far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ok: bool
    # Why not.
    reason: str | None = None
    organ: str | None = None
    version: str | None = None
    digest: str | None = None
    signature: SignatureState | None = None
    kernel: str | None = None
    # In which it was computed, and which the bundle's experts have: where they differ, weights are converted at load.
    dtype: str | None = None
    bundle_dtype: DTypeName | None = None
    # Whether the bundle brought its probe.
    probe_recorded: bool | None = None
    # The largest difference from the probe's outputs as a share of the layer's largest, and how much is allowed.
    worst_error: float | None = None
    tolerance: float | None = None
    # What all layers would take as the kernel keeps them.
    resident_bytes: int | None = None
    # The most that the checking process had in memory, files included, and how long the check took.
    peak_bytes: int | None = None
    seconds: float | None = None
