"""Scrapes what Ray's agent serves, of a Ray of our own and of the whole system."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from echovlm_ray.serving.cluster import metrics
from echovlm_ray.serving.cluster.metrics import MAX_VERSIONS, OTHER
from tests.running_system import ECHORAY, RunningSystem

ROOT = Path(__file__).resolve().parents[3]
# Ray's agent gathers every ten seconds.
TIMEOUT_S = 40.0
SAMPLE = re.compile(r"^ray_(echovlm_\w+)\{(.*)\} ([-+.e\d]+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
OURS = {"organ", "version", "kind", "caller", "system", "le"}
RAYS = {
    "Component",
    "NodeAddress",
    "SessionName",
    "Version",
    "WorkerId",
    "otel_scope_name",
    "otel_scope_schema_url",
    "otel_scope_version",
}

FEED = """
import time
import ray
from echovlm_ray.serving.cluster.ray_session import local_ray, metrics_addresses
from echovlm_ray.config import Config

@ray.remote(num_cpus=0)
class Part:
    def feed(self):
        from echovlm_ray.serving.cluster.metrics import ControlMetrics, DecodingMetrics, PartMetrics
        from echovlm_ray.serving.cluster.metrics import RefusalMetrics, RouterMetrics
        from protos.expert_pb2 import ResidentBundle

        router, control, part = RouterMetrics(), ControlMetrics(), PartMetrics("experts", "heart")
        router.request("heart", "1.0.0", tokens=7, seconds_per_token=0.02, kind="ok")
        router.request("heart", "1.1.0", tokens=3, seconds_per_token=None, kind="error")
        router.prefix_hits(4)
        router.prefix_hits(9)
        router.preemptions(2)
        router.preemptions(2)
        router.cache_blocks(total=10, free=7, kept=3)
        old, new = (ResidentBundle(version=version, resident_bytes=1000) for version in ("1.0.0", "1.1.0"))
        part.update(5, [old, new])
        part.update(3, [new])
        control.update({"heart": "1.0.0"}, [("heart", "1.1.0", "warm", 0.0)])
        control.update({"heart": "1.0.0"}, [("heart", "1.1.0", "canary", 5.0)])
        decoding = DecodingMetrics()
        decoding.update(4, {"ok": 5})
        decoding.update(2, {"ok": 7, "limit": 1})
        refusals = RefusalMetrics()
        refusals.update({("credentials", ""): 1, ("quota.concurrent", "ward"): 1})
        refusals.update({("credentials", ""): 4, ("quota.concurrent", "ward"): 2})
        # The registered metrics must outlive this call.
        self.kept = router, control, part, decoding, refusals

with local_ray(Config()):
    part = Part.remote()
    ray.get(part.feed.remote())
    print(metrics_addresses()[0], flush=True)
    input()
"""


def scrape(address: str) -> dict[tuple[str, ...], float]:
    """Name and our labels' values → value; the values of several processes are added up."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, ...], float] = {}
    for name, labels, value in SAMPLE.findall(text):
        ours = dict(LABEL.findall(labels))
        assert set(ours) <= OURS | RAYS, labels
        key = (name, *(ours[label] for label in ("organ", "version", "kind", "caller", "le") if label in ours))
        found[key] = found.get(key, 0.0) + float(value)
    return found


def scrape_until(address: str, done: Callable[[dict[tuple[str, ...], float]], bool]) -> dict[tuple[str, ...], float]:
    deadline = time.monotonic() + TIMEOUT_S
    while not done(found := scrape(address)):
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    return found


def test_what_the_parts_say_is_scraped_with_its_labels() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FEED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_metrics_report_interval_ms": "1000"},
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        found = scrape_until(address, lambda found: ("echovlm_rollout_percent", "heart", "1.1.0", "canary") in found)
    finally:
        process.communicate("\n", timeout=60)
    assert found["echovlm_requests_total", "heart", "1.0.0", "ok"] == 1
    assert found["echovlm_requests_total", "heart", "1.1.0", "error"] == 1
    assert found["echovlm_tokens_total", "heart", "1.0.0"] == 7
    assert found["echovlm_decoding_queue",] == 2
    assert found["echovlm_decoded_files_total", "ok"] == 7
    assert found["echovlm_decoded_files_total", "limit"] == 1
    refused = {key[1:]: value for key, value in found.items() if key[0] == "echovlm_refused_calls_total"}
    assert refused == {("credentials", ""): 4, ("quota.concurrent", "ward"): 2}
    assert found["echovlm_seconds_per_token_count", "heart", "1.0.0"] == 1
    assert found["echovlm_seconds_per_token_bucket", "heart", "1.0.0", "0.01"] == 0
    assert found["echovlm_seconds_per_token_bucket", "heart", "1.0.0", "0.025"] == 1
    assert ("echovlm_seconds_per_token_count", "heart", "1.1.0") not in found
    assert found[("echovlm_prefix_cache_hits_total",)] == 9
    assert found[("echovlm_preemptions_total",)] == 2
    blocks = {kind: found["echovlm_cache_blocks", kind] for kind in ("used", "kept", "free")}
    assert blocks == {"used": 3, "kept": 3, "free": 4}
    assert found["echovlm_queue_length", "heart", "experts"] == 3
    assert found["echovlm_resident_bytes", "heart", "1.0.0"] == 0
    assert found["echovlm_resident_bytes", "heart", "1.1.0"] == 1000
    assert found["echovlm_live", "heart", "1.0.0"] == 1
    assert found["echovlm_rollout_state", "heart", "1.1.0", "warm"] == 0
    assert found["echovlm_rollout_state", "heart", "1.1.0", "canary"] == 1
    assert found["echovlm_rollout_percent", "heart", "1.1.0", "canary"] == 5


def test_a_running_system_is_scraped(running_system: RunningSystem) -> None:
    printed = None
    deadline = time.monotonic() + 30
    while printed is None and time.monotonic() < deadline:
        # The system answers a moment before it says where everything is.
        time.sleep(0.2)
        printed = re.search(r"metrics +http://(\S+)/metrics", running_system.log.read_text())
    assert printed is not None, running_system.log.read_text()
    before = scrape(printed[1]).get(("echovlm_tokens_total", "heart", "1.0.0"), 0.0)
    command = ["generate", "--organ", "heart", "--task", "free", "--prompt", "Describe", "--max-new-tokens", "5"]
    subprocess.run(
        [ECHORAY, *command, "--server", running_system.gateway_address], check=True, capture_output=True, timeout=60
    )
    parts = {"gateway", "vision", "router", "control", "experts"}

    def complete(found: dict[tuple[str, ...], float]) -> bool:
        # Every part is exported in its own time.
        kinds = {key[-1] for key in found if key[0] == "echovlm_queue_length"}
        return (
            kinds == parts
            and ("echovlm_live", "heart", "1.0.0") in found
            and ("echovlm_resident_bytes", "heart", "1.0.0") in found
            and ("echovlm_requests_total", "heart", "1.0.0", "ok") in found
            and found.get(("echovlm_tokens_total", "heart", "1.0.0"), 0.0) > before
        )

    found = scrape_until(printed[1], complete)
    assert found["echovlm_requests_total", "heart", "1.0.0", "ok"] >= 1
    assert found["echovlm_resident_bytes", "heart", "1.0.0"] > 100_000
    assert found["echovlm_live", "heart", "1.0.0"] == 1


def test_outside_a_ray_nothing_happens_and_nothing_is_loaded() -> None:
    code = (
        "import sys; from echovlm_ray.serving.cluster.metrics import *\n"
        "RouterMetrics().request('heart', '1', tokens=1, seconds_per_token=0.1, kind='ok')\n"
        "PartMetrics('router', '').update(1, []); ControlMetrics().update({'heart': '1'}, [])\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_versions_are_bounded() -> None:
    versions = metrics._Versions()
    bounded = {versions.bounded(f"1.0.{number}") for number in range(MAX_VERSIONS + 50)}
    assert len(bounded) == MAX_VERSIONS + 1
    assert OTHER in bounded
    # Those that were known stay what they are.
    assert versions.bounded("1.0.0") == "1.0.0"
