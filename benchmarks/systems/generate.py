"""Plain `generate` of transformers: `python -m benchmarks.systems.generate --checkpoint DIR --threads N`.

The whole model in one process, eager experts, torch's own linear layers, and a batch that begins and ends together.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.systems.protocol import Run, now, serve_workloads
from benchmarks.timings import Timings
from benchmarks.workload import Workload
from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration


class TokenClock(BaseStreamer):
    """Notes when `generate` hands over each step's tokens; the prompt comes first, and is no step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with every step's tokens."""
        if self._prompt_came:
            self.times.append(now())
        self._prompt_came = True

    def end(self) -> None:
        """Called by `generate` at its end."""


@torch.inference_mode()
def run_generate(model: EchoVLMForConditionalGeneration, workload: Workload) -> Timings:
    """All streams in one batch; every stream's token comes when the step is done."""
    input_ids = torch.tensor(workload.prompts)
    clock = TokenClock()
    began = now()
    model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=workload.new_tokens,
        do_sample=False,
        streamer=clock,
    )
    times = tuple(time - began for time in clock.times)
    streams = len(workload.prompts)
    return Timings(workload.prompt_tokens, (0.0,) * streams, (times,) * streams)


@contextmanager
def open_generate(checkpoint: Path, threads: int) -> Iterator[Run]:
    """The model, loaded."""
    torch.set_num_threads(threads)
    model = EchoVLMForConditionalGeneration.from_pretrained(
        checkpoint, dtype="auto", experts_implementation="eager"
    ).eval()
    # Random weights may generate the end token at any time.
    model.generation_config.eos_token_id = None
    yield lambda workload: run_generate(model, workload)


def main() -> None:
    """Runs workloads from the standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder in the released layout")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")
    options = parser.parse_args()
    serve_workloads(lambda: open_generate(options.checkpoint, options.threads))


if __name__ == "__main__":
    main()
