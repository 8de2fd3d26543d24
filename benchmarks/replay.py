"""Computing past answers again under load: `python -m benchmarks.replay`.

Starts a system on a copy of the demo checkpoint, promotes one version after another, each of the next organ in turn,
and has every expert set answer a few requests, which are recorded as `echoray generate --save-request` does. Then all
recorded answers are computed again in random order while other callers ask without pause, and compared token by token.
Writes `benchmarks/results/replay.md`.
"""

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.measure_table import table_head
from benchmarks.running_parts import first_replicas
from benchmarks.swap_operations import write_version
from benchmarks.swap_streams import Streams
from benchmarks.swaps import copied
from benchmarks.systems.protocol import MeasuredSystem, SystemFailedError, exit_on_sigterm
from benchmarks.terminal import progress_of_parts, show_result
from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.cli.saved_request import first_difference, read_request, saved_request, write_request
from echovlm_ray.client import EchoVLMClient, EchoVLMError
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.request import GenerateOptions
from echovlm_ray.data.phantom.corpus import png_bytes
from echovlm_ray.data.phantom.phantom import phantoms
from experts.registry.registry import Registry

RESULT = Path(__file__).resolve().parent / "results" / "replay.md"
PROMPTS = ("What is shown?", "Describe the image.", "Is there flow?")
TIMEOUT_S = 120.0
POLL_S = 0.05
WHO = "benchmark"


@dataclass
class Replayed:
    """The results of the replays.

    Attributes:
        equal: how many gave the same tokens.
        differences: of the others, which record and the first token that differs.
        seconds: from asking for the set to the whole answer, of each.
        most_bundles: the most that were resident in a replica while they ran.
    """

    equal: int = 0
    differences: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    most_bundles: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """What the experts' processes hold.

    Attributes:
        bundles: of all replicas together.
        weights_bytes: of these bundles, as the replicas count them.
        process_bytes: organ's application → resident memory of its process.
    """

    bundles: int
    weights_bytes: int
    process_bytes: Mapping[str, int]

    @classmethod
    def of(cls, control: ExpertControlClient, processes: Mapping[str, psutil.Process]) -> "Memory":
        """Now."""
        shares = [share for replica in control.list().replicas for share in replica.bundles]
        resident = {name: int(process.memory_info().rss) for name, process in processes.items()}
        return cls(len(shares), sum(share.resident_bytes for share in shares), resident)


def record_answers(
    control: ExpertControlClient, client: EchoVLMClient, checkpoint: Path, work: Path, versions: int, each: int
) -> list[Path]:
    """Promotes versions, and has the set after each promotion answer; the records' files, in that order."""
    index = read_index(checkpoint)
    organs = [entry.organ for entry in index.organs]
    images = [png_bytes(phantom.image) for phantom in phantoms(20, range(each))]
    records = []
    for number in range(versions):
        organ = organs[number % len(organs)]
        source = Registry(registry_root(checkpoint)).open(index.entry(organ).bundle_digest)
        version = f"9.{number}.0"
        folder = work / version
        write_version(folder, source, version, 1 + number // len(organs))
        digest = control.push(folder).digest
        control.stage(organ, digest=digest, actor=WHO)
        _until_warm(control, organ)
        control.promote(organ, digest=digest, actor=WHO)
        for turn in range(each):
            # Most requests use what was just promoted, the others any other organ.
            asked = organ if turn % 3 else organs[(number + turn) % len(organs)]
            path = work / f"{number}-{turn}.json"
            _record(client, asked, images[turn], 1000 * number + turn, path)
            records.append(path)
    return records


def _until_warm(control: ExpertControlClient, organ: str) -> None:
    while (rollout := control.list(organ).rollouts[0]).state != "warm":
        if rollout.state == "failed":
            raise SystemFailedError(rollout.reason)
        time.sleep(POLL_S)


def _record(client: EchoVLMClient, organ: str, image: bytes, seed: int, path: Path) -> None:
    options: GenerateOptions = {
        "task": "report",
        "language": "zh" if seed % 2 else "en",
        "prompt": "",
        "organs": [organ],
        # Half of them greedy, half of them drawn.
        "temperature": 1.0 if seed % 4 < 2 else 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "seed": seed,
        "max_new_tokens": 48,
        "stop": [],
        "for_replay": True,
    }
    answer = client.generate([image], timeout_s=TIMEOUT_S, **options)
    write_request(path, saved_request(options, [image], [image], answer.summary, path.parent))


def replay_all(
    control_address: str, server: str, records: Sequence[Path], workers: int, advance: Callable[[], None]
) -> Replayed:
    """Computes all records again, so many at a time, each as `echoray experts replay` does."""
    found, lock = Replayed(), threading.Lock()

    def replay(path: Path) -> None:
        request, images = read_request(path)
        began = time.monotonic()
        with ExpertControlClient(control_address) as control, EchoVLMClient(server) as client:
            answer = request.answer
            organs = [organ.organ for organ in answer.organs]
            with control.replay(answer.expert_set_id, organs=organs, backbone_digest=answer.backbone_digest) as held:
                held.wait()
                again = client.generate(images, timeout_s=TIMEOUT_S, **request.options()).summary
                seconds = time.monotonic() - began
                bundles = max(len(replica.bundles) for replica in control.list().replicas)
        place = first_difference(answer.token_ids, again.token_ids)
        same_set = again.provenance.expert_set_id == answer.expert_set_id
        with lock:
            found.seconds.append(seconds)
            found.most_bundles = max(found.most_bundles, bundles)
            if place is None and same_set:
                found.equal += 1
            else:
                found.differences.append(f"{path.name}: token {place}")

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(replay, records):
            advance()
    return found


def measure(
    options: argparse.Namespace, checkpoint: Path, work: Path, console: Console
) -> tuple[str, dict[str, object]]:
    """Starts the system, records and replays; the report and its values."""
    organs = [entry.organ for entry in read_index(checkpoint).organs]
    arguments = ["-m", "benchmarks.systems.gateway", "--checkpoint", str(checkpoint)]
    total = options.versions * options.answers
    with MeasuredSystem(arguments, {}) as system, progress_of_parts(console) as progress:
        task = progress.add_task("starting the system", total=total)
        ready = system.wait_until_ready()
        with ExpertControlClient(ready["control"]) as control, EchoVLMClient(ready["address"]) as client:
            parts = first_replicas(ready["control"])
            processes = {name: psutil.Process(part.pid) for name, part in parts.items() if name.startswith("expert-")}
            progress.update(task, description="promoting and recording")
            records = record_answers(control, client, checkpoint, work, options.versions, options.answers)
            random.Random(options.seed).shuffle(records)
            _until_bundles(control, len(organs))
            before = Memory.of(control, processes)
            policy = control.list().live.id
            progress.update(task, description="replaying")
            began = time.monotonic()
            with Streams(ready["address"], organs[: options.streams], PROMPTS, 32) as streams:
                found = replay_all(
                    ready["control"], ready["address"], records, options.workers, lambda: progress.advance(task)
                )
            took = time.monotonic() - began
            back_s = _until_bundles(control, len(organs))
            after = Memory.of(control, processes)
            unchanged = control.list().live.id == policy
    return _report(options, found, streams, before, after, took, back_s, unchanged)


def _until_bundles(control: ExpertControlClient, number: int) -> float:
    """Waits until a number of bundles is resident in all replicas together; returns the seconds."""
    began = time.monotonic()
    while sum(len(replica.bundles) for replica in control.list().replicas) != number:
        if time.monotonic() - began > TIMEOUT_S:
            raise SystemFailedError(f"the replicas do not come back to {number} bundles")
        time.sleep(POLL_S)
    return time.monotonic() - began


def _report(
    options: argparse.Namespace,
    found: Replayed,
    streams: Streams,
    before: Memory,
    after: Memory,
    took: float,
    back_s: float,
    unchanged: bool,
) -> tuple[str, dict[str, object]]:
    total = options.versions * options.answers
    growth = {name: after.process_bytes[name] - size for name, size in before.process_bytes.items()}
    mib = 1024**2
    rows = [
        ("answers equal, token for token", f"{found.equal} of {total}"),
        (
            "seconds for one replay, median and longest",
            f"{statistics.median(found.seconds):.2f}, {max(found.seconds):.2f}",
        ),
        ("seconds for all", f"{took:.0f}"),
        ("answers of the other callers meanwhile, failed", f"{len(streams.heard)}, {len(streams.failures)}"),
        ("the live set unchanged", "yes" if unchanged else "no"),
        ("bundles resident before, after", f"{before.bundles}, {after.bundles}"),
        ("their bytes before, after", f"{before.weights_bytes:,}, {after.weights_bytes:,}"),
        ("most bundles on one replica meanwhile", str(found.most_bundles)),
        ("seconds until all were gone", f"{back_s:.1f}"),
        (
            "resident memory of the experts' processes before, after (MiB, all together)",
            f"{sum(before.process_bytes.values()) / mib:.0f}, {sum(after.process_bytes.values()) / mib:.0f}",
        ),
        ("largest growth of one of them (MiB)", f"{max(growth.values()) / mib:.1f}"),
    ]
    text = "\n".join(
        [
            "# Past answers computed again",
            "",
            describe(),
            f"The demo; {options.versions} versions promoted one after the other, each of the next organ in turn; "
            f"{options.answers} reports with each set, half of them greedy, recorded; all replayed in random order, "
            f"{options.workers} at a time, while {options.streams} other callers ask without pause. "
            "`python -m benchmarks.replay`.",
            "",
            *table_head("| measure | value |"),
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "A replay loads what its set needs and replicas do not hold, asks, compares, and releases them. "
            "What processes keep beyond their weights is what the allocator does not return to the system.",
            "",
            *found.differences[:20],
            *streams.failures[:20],
        ]
    )
    return text.rstrip() + "\n", dict(rows) | {"ok": found.equal == total and not streams.failures and unchanged}


def main() -> None:
    """Measures, prints and writes the result; ends with 1 where an answer differs or another request failed."""
    options = _options()
    exit_on_sigterm()
    console = Console(stderr=options.json)
    try:
        with copied(None) as (checkpoint, work), tempfile.TemporaryDirectory(dir=work) as folder:
            text, values = measure(options, checkpoint, Path(folder), console)
    except (EchoVLMError, SystemFailedError) as error:
        sys.exit(f"the system failed: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
    show_result(text, values, console, as_json=options.json)
    options.output.write_text(text)
    if not values["ok"]:
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=20, help="that are promoted (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=10, help="of each set (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="replays at a time (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=3, help="other callers meanwhile (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the order (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, default=RESULT, help="file for the result (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
