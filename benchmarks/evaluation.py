"""The speed-up of an evaluation by concurrent questions: `python -m benchmarks.evaluation --start CHECKPOINT`.

`echoray eval` asks the served system the same kind of questions one at a time and eight at once, in turn, run after
run. Every run has images of its own, so that no cache of embeddings or of prefixes answers for the system. Writes
`benchmarks/results/evaluation.md` and `.json`.
"""

import argparse
import asyncio
import io
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from benchmarks.measured_gateway import add_gateway_options, gateway_of
from benchmarks.systems.protocol import SystemFailedError, exit_on_sigterm
from benchmarks.terminal import add_result_options, keep_result, progress_of_parts
from echovlm_ray.client import AsyncEchoVLMClient, EchoVLMError
from echovlm_ray.data.dataset import RecordDataset
from echovlm_ray.data.draws import draws_of
from echovlm_ray.data.media import ImageRoot
from echovlm_ray.evaluation.answers import AnswerLog
from echovlm_ray.evaluation.asking import Asking, ask_all, target_of, work_of
from echovlm_ray.evaluation.items import load_items
from echovlm_ray.evaluation.settings import AskSettings, RequestLimits, settings_digest
from echovlm_ray.tasks import TASKS
from echovlm_ray.vision.images import ImageLimits

TARGET = 2.0
SIDE = 224
LIMITS = ImageLimits(max_image_bytes=10**7, max_image_pixels=10**7, max_frames=8)


def write_dataset(folder: Path, records: int, run: int) -> Path:
    """Reports in both languages on images of noise, different in every run."""
    lines = []
    for number in range(records):
        pixels = draws_of(run, 0, number).integers(0, 256, size=(SIDE, SIDE, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{number}.png").write_bytes(buffer.getvalue())
        question = TASKS["report"].instructions["en" if number % 2 == 0 else "zh"]
        turns = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": "-"}]
        lines.append(json.dumps({"id": str(number), "image": [f"{number}.png"], "conversations": turns}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


async def evaluate(server: str, records: int, new_tokens: int, concurrency: int, run: int) -> tuple[float, int]:
    """Seconds and number of questions of one evaluation: the model's, and those of two baselines."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with RecordDataset(write_dataset(folder, records, run)) as dataset:
            items = load_items(dataset).items
        asking = AskSettings(max_new_tokens=new_tokens)
        async with AsyncEchoVLMClient(server, retry=False) as client:
            digest = settings_digest(target_of(await client.model_info()), asking, 0)
            with AnswerLog(folder / "answers.jsonl") as log:
                request_limits = RequestLimits(concurrency=concurrency)
                plan = Asking(ImageRoot(folder), log, digest, asking, request_limits, LIMITS, 0)
                work = work_of(items, 0)
                started = time.perf_counter()
                outcome = await ask_all(client, work, plan)
                seconds = time.perf_counter() - started
        answered = sum(map(len, outcome.answers.values()))
        if answered < len(work):
            raise SystemFailedError(f"{len(work) - answered} questions have no answer")
        return seconds, len(work)


def report(options: argparse.Namespace, found: dict[int, list[float]], questions: int) -> tuple[str, dict[str, Any]]:
    """The result as Markdown and as values."""
    medians = {concurrency: statistics.median(seconds) for concurrency, seconds in found.items()}
    ratios = sorted(one / many for one, many in zip(found[1], found[options.concurrency], strict=True))
    ratio = statistics.median(ratios)
    lines = [
        "# An evaluation on the service, many questions at once",
        "",
        describe(),
        f"{questions} questions a run ({options.records} records, asked with their own image, a blank one and another "
        f"record's), {options.new_tokens} new tokens at most, greedy; {options.runs} runs of each, in turn.",
        "",
        *table_head("| questions at once | seconds, median | questions a second |"),
        *(f"| {count} | {seconds:.2f} | {questions / seconds:.2f} |" for count, seconds in medians.items()),
        "",
        f"{options.concurrency} at once ÷ one at a time: **{ratio:.2f} ×** (runs: "
        f"{', '.join(f'{value:.2f}' for value in ratios)}); target ≥ {TARGET:.0f} ×.",
    ]
    values = {"machine": describe(), "questions": questions, "seconds": found, "ratio": ratio, "target": TARGET}
    return "\n".join(lines) + "\n", values


def main() -> None:
    """Measures, prints and writes the result."""
    options = _options()
    exit_on_sigterm()
    console = Console(stderr=options.json)
    found: dict[int, list[float]] = {1: [], options.concurrency: []}
    questions = 0
    try:
        with ExitStack() as stack:
            server = gateway_of(options, console, stack)
            bar = stack.enter_context(progress_of_parts(console))
            task = bar.add_task("warming up", total=1 + len(found) * options.runs)
            asyncio.run(evaluate(server, 8, options.new_tokens, options.concurrency, 0))
            bar.advance(task)
            for run in range(options.runs):
                for place, concurrency in enumerate(found):
                    bar.update(task, description=f"{concurrency} at once")
                    images = 1 + run * len(found) + place
                    evaluation = evaluate(server, options.records, options.new_tokens, concurrency, images)
                    seconds, questions = asyncio.run(evaluation)
                    found[concurrency].append(seconds)
                    bar.advance(task)
    except (EchoVLMError, SystemFailedError) as error:
        sys.exit(f"the system failed: {error}")
    text, values = report(options, found, questions)
    keep_result("evaluation", text, values, options, console)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_gateway_options(parser)
    parser.add_argument("--records", type=int, default=16, help="of each run (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=48, help="at most, of each answer (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="questions at once (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of each kind (default: %(default)s)")
    add_result_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
