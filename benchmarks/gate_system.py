"""A router in this process that serves candidates; the gate's evaluator gets its address, as from Control.

The router's service, its engine, the vision encoder and the experts are those that serve; only Ray is missing.
"""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from echovlm_ray.serving.cluster.served import served_checkpoint
from echovlm_ray.serving.deploy.in_process import AnsweringRouter, answering_router, local_configuration
from echovlm_ray.serving.gates.evaluator import GateEvaluator
from experts.transport.inner_channel import PLAIN_CHANNELS
from router.dispatch.local import LocalExperts
from router.rollouts.settings import RolloutSettings
from router.rollouts.traffic import CandidateTraffic, TrafficPolicy


@dataclass(slots=True)
class GateSystem:
    """A router that answers, and what evaluates with it.

    Attributes:
        stable: organ → digest of its stable version.
        policies: how many candidates were offered.
    """

    evaluator: GateEvaluator
    router: AnsweringRouter
    stable: Mapping[str, str]
    loop: asyncio.AbstractEventLoop
    policies: int = 0

    def offer(self, organ: str, digest: str) -> None:
        """Makes a bundle of the registry the organ's candidate, warm and without traffic, as one that has gates."""
        placement, sets = self.router.engine.dispatcher.placement, self.router.expert_sets
        assert isinstance(placement, LocalExperts)
        placement.groups[organ].load(digest)
        self.policies += 1
        candidate = CandidateTraffic(organ=organ, digest=digest, rollout_id=f"{organ}-1", mode="shadow", percent=0)
        policy = TrafficPolicy(version=self.policies, stable=sets.policy.stable, candidates=(candidate,))
        asyncio.run_coroutine_threadsafe(sets.take_up(policy), self.loop).result()


@contextmanager
def gate_system(checkpoint: Path, *, questions_per_s: float) -> Iterator[GateSystem]:
    """Serves a split checkpoint until the block ends.

    Args:
        checkpoint: a folder that `echoray checkpoint split` or `demo` made; candidates come from its registry.
        questions_per_s: see `RolloutSettings.gate_questions_per_s`.
    """
    config = local_configuration(checkpoint)
    served = served_checkpoint(config.model)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with TemporaryDirectory(prefix="echovlm-gates-") as folder:
        serving = answering_router(config, served, Path(folder))
        router = asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result()
        evaluator = GateEvaluator(
            served,
            lambda: [router.address],
            PLAIN_CHANNELS,
            RolloutSettings(gate_questions_per_s=questions_per_s),
            config.gateway,
            config.router,
            config.model.default_organ,
        )
        stable = {member.organ: member.bundle_digest for member in served.expert_set.members}
        try:
            yield GateSystem(evaluator, router, stable, loop)
        finally:
            asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
