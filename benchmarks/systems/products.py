"""Only the products of a decoding step, divided over two processes: `python -m benchmarks.systems.products`.

What no system can do without that computes with these products on two cores: every weight matrix of the backbone, and
of as many experts as a step reads, is cut in two halves of its outputs, and each of two processes with one thread
computes its halves, packed, without ever waiting for the other. No attention, no gate, no norm, no sampling, no
exchange: the outputs are thrown away.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import DTYPES
from benchmarks.systems.protocol import Run, now, serve_workloads
from benchmarks.timings import Timings
from benchmarks.workload import Workload
from experts.kernels.packed_linear import PackedLinear

PROCESSES = 2
SEED = 0


class HalfOfTheProducts:
    """A half of every matrix that a decoding step multiplies with, joined and packed as the engine and the experts do.

    Random weights: the time does not depend on them.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Makes and packs the weights of a config.json."""
        self._dtype = DTYPES[config["torch_dtype"]]
        self._config = config
        hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
        generator = torch.Generator().manual_seed(SEED)

        def half(inputs: int, outputs: int) -> PackedLinear:
            weight_OI = torch.randn(outputs // PROCESSES, inputs, generator=generator).mul_(0.02)
            return PackedLinear(weight_OI.to(self._dtype))

        shapes = backbone_products(config)
        layers = range(config["num_hidden_layers"])
        self._backbone = [[half(*shape) for shape in shapes] for _ in layers]
        self._experts = [
            [(half(hidden, 2 * inner), half(inner, hidden)) for _ in range(config["num_experts"])] for _ in layers
        ]
        self._head = half(hidden, config["vocab_size"])

    def steps(self, rows: int, count: int) -> list[float]:
        """Computes so many steps of so many sequences; when each was done.

        Every expert gets an equal part of the rows, and only as many experts as there are places for are read.
        """
        places = rows * self._config["num_experts_per_tok"]
        used = min(self._config["num_experts"], places)
        rows_of_expert = -(-places // used)
        step: list[tuple[PackedLinear, int]] = []
        for backbone, experts in zip(self._backbone, self._experts, strict=True):
            step += [(product, rows) for product in backbone]
            step += [(product, rows_of_expert) for pair in experts[:used] for product in pair]
        step.append((self._head, rows))
        inputs = {
            (product.in_features, of): torch.randn(of, product.in_features).to(self._dtype) for product, of in step
        }
        ends = []
        for _ in range(count):
            for product, of in step:
                product.product(inputs[product.in_features, of])
            ends.append(now())
        return ends


def backbone_products(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's products: queries, keys and values in one; what follows attention; all gates and
    ups of dense MLP and shared expert in one; the down of each.
    """
    hidden = config["hidden_size"]
    head_size = hidden // config["num_attention_heads"]
    keys_and_values = 2 * head_size * config["num_key_value_heads"]
    dense, shared = config["intermediate_size"], config["shared_expert_intermediate_size"]
    return [
        (hidden, hidden + keys_and_values),
        (hidden, hidden),
        (hidden, 2 * (dense + shared)),
        (dense, hidden),
        (shared, hidden),
    ]


def _compute(connection: Connection, config: Mapping[str, Any]) -> None:
    """The life of one of the processes: rows and steps come in, ends go out."""
    torch.set_num_threads(1)
    half = HalfOfTheProducts(config)
    connection.send([])
    with torch.inference_mode():
        while (asked := connection.recv()) is not None:
            connection.send(half.steps(*asked))


@contextmanager
def open_products(checkpoint: Path) -> Iterator[Run]:
    """Both processes, ready."""
    config = json.loads((checkpoint / "config.json").read_text())
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(PROCESSES)]
    processes = [context.Process(target=_compute, args=(theirs, config), daemon=True) for _, theirs in pipes]
    for process in processes:
        process.start()
    connections = [ours for ours, _ in pipes]

    def run(workload: Workload) -> Timings:
        streams = len(workload.prompts)
        began = now()
        for connection in connections:
            connection.send((streams, workload.new_tokens))
        # They need not be done together: work could be moved from the slower one to the other.
        ends = zip(*(connection.recv() for connection in connections), strict=True)
        times = tuple(sum(of_each) / PROCESSES - began for of_each in ends)
        return Timings(workload.prompt_tokens, (0.0,) * streams, (times,) * streams)

    for connection in connections:
        connection.recv()
    yield run
    for connection in connections:
        connection.send(None)
    for process in processes:
        process.join()


def main() -> None:
    """Runs workloads from the standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder with config.json")
    options = parser.parse_args()
    serve_workloads(lambda: open_products(options.checkpoint))


if __name__ == "__main__":
    main()
