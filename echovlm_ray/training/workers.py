"""Several workers through Ray Train: each runs `train_stage`, and their gradients are averaged."""

import os
from typing import Any

from echovlm_ray.training.errors import TrainingError
from echovlm_ray.training.stage import StageJob, micro_batches, require_divisible, train_stage


def train_on_ray(job: StageJob) -> None:
    """Starts `job.workers` workers on the cluster of `RAY_ADDRESS`, or on this machine, and waits for them.

    The folders of the job must be the same for all of them: with several machines, on storage that they share.

    Raises:
        TrainingError: there are fewer processors than workers, or a worker failed; its own text is in the message.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    micro_batches(job)
    require_divisible(job)
    on_gpu = job.device == "cuda"
    if not ray.is_initialized():
        ray.init(log_to_driver=not job.quiet, include_dashboard=False)
    kind = "GPU" if on_gpu else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    # A cluster that grows on demand may have none yet.
    if "RAY_ADDRESS" not in os.environ and there < job.workers:
        raise TrainingError(
            f"{job.workers} workers need a {kind} each and there are {there}: give --workers {there or 1}"
        )
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job.model_dump_json()},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=job.workers, use_gpu=on_gpu),
        run_config=RunConfig(name=job.folder.name, storage_path=str(job.folder / "ray")),
    )
    try:
        trainer.fit()
    except Exception as error:
        cause = _cause(error)
        raise TrainingError(f"a worker failed: {cause}. Go on with: {job.resume}") from error


def _work(config: dict[str, Any]) -> None:
    train_stage(StageJob.model_validate_json(config["job"]))


def _cause(error: BaseException) -> str:
    """The last line of Ray's message, which has the worker's error."""
    failures = getattr(error, "worker_failures", None)
    text = str(next(iter(failures.values()))) if failures else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
