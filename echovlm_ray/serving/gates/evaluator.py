"""Evaluates a gate on the running system: the questions go to the routers that serve, pinned to one version."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from echovlm_ray.config import DecodersSection, GatewaySection, RouterSection
from router.rollouts.gates import EvaluationInterruptedError, Evidence, Gate, GateRun, UnusableGateError
from router.rollouts.settings import RolloutSettings

if TYPE_CHECKING:
    from echovlm_ray.serving.cluster.served import ServedCheckpoint
    from echovlm_ray.serving.gates.dataset import GateDataset
    from experts.transport.inner_channel import InnerChannels


class GateEvaluator:
    """Implements `router.rollouts.gates.Evaluator` over the serving routers. Nothing of it stays between evaluations.

    The answers are those of callers: the same gateway code reads the images and writes the prompt, and the routers
    compute with the replicas that will serve.
    """

    def __init__(
        self,
        served: "ServedCheckpoint",
        routers: Callable[[], Sequence[str]],
        channels: "InnerChannels",
        settings: RolloutSettings,
        gateway: GatewaySection,
        limits: RouterSection,
        default_organ: str,
    ) -> None:
        """
        Args:
            served: the checkpoint, whose tokenizer and image processor are used.
            routers: their addresses now.
            channels: opens channels to them.
            settings: how fast, and how much.
            gateway: the limits of images.
            limits: the limits of tokens.
            default_organ: of the model.
        """
        self._served = served
        self._routers = routers
        self._channels = channels
        self._settings = settings
        # One question at a time needs one decoder.
        self._gateway = gateway.model_copy(
            update={"decoders": DecodersSection.model_validate({**gateway.decoders.model_dump(), "processes": 1})}
        )
        self._limits = limits
        self._default_organ = default_organ

    def declare(self, gate: Gate) -> Gate:
        from echovlm_ray.serving.gates.figures import check_metric

        if missing := self._served.missing_text_files:
            raise UnusableGateError(f"the served checkpoint has no {' and no '.join(missing)}, so it answers no text")
        dataset = self._read(gate)
        check_metric(gate, dataset.items)
        return gate.model_copy(update={"dataset_digest": dataset.digest})

    def evaluate(self, run: GateRun) -> Evidence:
        from echovlm_ray.serving.gates.figures import check_metric, evidence_of
        from echovlm_ray.serving.gates.questions import Questioner

        digests = [run.digest]
        if run.gate.not_below_incumbent_by is not None:
            if run.incumbent_digest is None:
                raise UnusableGateError(f"{run.gate.organ!r} has no stable version to compare with any more")
            digests.append(run.incumbent_digest)
        questioner = Questioner(
            self._served,
            self._routers,
            self._channels,
            self._settings.gate_questions_per_s,
            self._gateway,
            self._limits,
            self._default_organ,
        )
        try:
            dataset = self._read(run.gate, run.cancelled.is_set)
            check_metric(run.gate, dataset.items)
            answers = questioner.answers(run, dataset, digests)
            # What was asked is what the digest says, also where a file changed meanwhile.
            self._read(run.gate, run.cancelled.is_set)
        except InterruptedError:
            raise EvaluationInterruptedError("it is not wanted any more") from None
        incumbent = (digests[1], answers[1]) if len(digests) > 1 else None
        return evidence_of(run.gate, dataset.items, answers[0], dataset.digest, incumbent)

    def _read(self, gate: Gate, is_cancelled: Callable[[], bool] = lambda: False) -> "GateDataset":
        from echovlm_ray.serving.gates.dataset import read_dataset

        return read_dataset(gate, self._settings.max_gate_records, self._gateway.max_image_bytes, is_cancelled)
