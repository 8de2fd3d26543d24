"""Checks bundles in a separate process, so that one that crashes or exhausts memory does not end Control."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from echovlm_ray.checkpoint.backbone_dtype import compute_dtype
from echovlm_ray.config import ExpertsSection, ModelSection, RolloutsSection
from echovlm_ray.serving.control.bundles import kept_folder, registry_location, signature_policy
from experts.checks.check import BackboneSizes, CheckRequest
from experts.checks.isolated_check import IsolatedChecks
from experts.errors import InvalidBundleError
from experts.registry.source import BundleSource

if TYPE_CHECKING:
    from experts.bundles.manifest import Manifest

# What Control itself can compute with, where the experts' own kernel needs a GPU that Control does not have.
CPU_KERNEL = "auto"


class SubprocessVerifier:
    """A `router.rollouts.fleet.Verifier`: files, signature, shapes, backbone, finite weights, gates, and the self-test.

    Gates and self-test are computed in the backbone's dtype; a bundle of another one is converted or refused, as
    `experts.other_dtype` says. The self-test runs on the CPU. Where an organ's experts run on a GPU, it runs there with
    the CPU's default kernel: it then says that the weights compute what was recorded, and the GPU's own kernel is
    tested when they load, see `experts.warm_up`.
    """

    def __init__(
        self,
        model: ModelSection,
        experts: ExpertsSection,
        rollouts: RolloutsSection,
        backbone: "Callable[[], Manifest]",
    ) -> None:
        """
        Args:
            model: where the checkpoint is, and the dtype in which it is served.
            experts: where bundles are, which may load, and the kernel.
            rollouts: how much time and memory a check may take.
            backbone: a bundle that is served now: whatever its backbone and sizes are, others must have them too.
        """
        self._model = model
        self._experts = experts
        self._rollouts = rollouts
        self._backbone = backbone
        self._checks = IsolatedChecks(idle_priority=True)

    def close(self) -> None:
        """Ends the process that checks are forked from."""
        self._checks.close()

    def verify(self, organ: str, digest: str) -> None:
        """See `Verifier`.

        Raises:
            InvalidBundleError: the bundle must not be used; the text says why.
        """
        served = self._backbone()
        on_gpu = bool(self._experts.resources_of(organ).num_gpus) and self._model.device != "cpu"
        request = CheckRequest(
            source=BundleSource(
                registry=registry_location(self._experts, self._model.checkpoint),
                digest=digest,
                # What was served before can come back while the registry is away.
                copy_folder=kept_folder(self._experts, self._model.checkpoint) / digest,
            ),
            organ=organ,
            backbone=BackboneSizes(
                digest=served.backbone_digest, num_layers=served.num_layers, hidden_size=served.hidden_size
            ),
            policy=signature_policy(self._experts),
            kernel=CPU_KERNEL if on_gpu else self._experts.kernel,
            dtype=compute_dtype(self._model.checkpoint, self._model.dtype),
            other_dtype=self._experts.other_dtype,
            memory_bytes=self._rollouts.verify_memory_bytes,
            torch_threads=self._model.torch_threads,
        )
        result = self._checks.check(request, timeout_s=self._rollouts.verify_timeout_s)
        if not result.ok:
            raise InvalidBundleError(result.reason or "the check gave no reason")
