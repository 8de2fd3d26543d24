"""Verifies bundles in a separate process, so that a bundle that crashes or exhausts memory does not end Control."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from echovlm_ray.checkpoint.backbone_dtype import compute_dtype
from echovlm_ray.config import ExpertsSection, ModelSection, RolloutsSection
from echovlm_ray.serving.control.bundles import kept_folder, registry_location, signature_policy
from experts.checks.check_request import BackboneSizes, CheckRequest
from experts.checks.isolated_check import IsolatedChecks
from experts.errors import InvalidBundleError
from experts.registry.source import BundleSource

if TYPE_CHECKING:
    from experts.bundles.manifest import Manifest

# The kernel for Control if the experts' kernel needs a GPU, which Control does not have.
CPU_KERNEL = "auto"


class SubprocessVerifier:
    """A `router.rollouts.fleet.Verifier`: files, signature, shapes, backbone, finite weights, gates, and the self-test.

    Gates and self-test are computed in the backbone's dtype; a bundle with another one is converted or refused,
    according to `experts.other_dtype`. The self-test runs on the CPU. If an organ's experts run on a GPU, the self-test
    uses the CPU's default kernel and verifies the weights; the GPU's kernel is tested at load, see `experts.warm_up`.
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
            model: the checkpoint and the dtype.
            experts: the registry, the policy for bundles, and the kernel.
            rollouts: the time and memory limits of a verification.
            backbone: a live bundle, whose backbone and sizes the others must have.
        """
        self._model = model
        self._experts = experts
        self._rollouts = rollouts
        self._backbone = backbone
        self._checks = IsolatedChecks(idle_priority=True)

    def close(self) -> None:
        """Ends the fork server."""
        self._checks.close()

    def verify(self, organ: str, digest: str) -> None:
        """See `Verifier`.

        Raises:
            InvalidBundleError: the bundle must not be used; the text has the reason.
        """
        served = self._backbone()
        on_gpu = bool(self._experts.resources_of(organ).num_gpus) and self._model.device != "cpu"
        request = CheckRequest(
            source=BundleSource(
                registry=registry_location(self._experts, self._model.checkpoint),
                digest=digest,
                # Earlier live bundles can be restored while the registry is unavailable.
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
