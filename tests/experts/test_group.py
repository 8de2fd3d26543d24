import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.bundles.bundle import Bundle
from experts.bundles.manifest import Manifest
from experts.errors import (
    BundleNotResidentError,
    BundleUnusableError,
    ExpertCapacityError,
    InvalidBundleError,
    InvalidTensorError,
    SignatureError,
    UnknownBundleError,
)
from experts.group import ExpertGroup
from experts.kernels.base import ExpertWeights
from experts.kernels.reference import ReferenceExperts, ReferenceKernel
from experts.registry.registry import Registry

MakeBundle = Callable[..., Path]
# 2 layers × 3 experts × 3 matrices of 16 × 24 in float32.
BUNDLE_BYTES = 2 * 3 * 3 * 16 * 24 * 4


def exchange(tokens: int = 5, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return (
        torch.randn((tokens, 16), generator=generator).to(dtype),
        torch.randint(-1, 3, (tokens, 2), generator=generator, dtype=torch.int32),
        torch.rand((tokens, 2), generator=generator).to(dtype),
    )


class GatedKernel(ReferenceKernel):
    """The reference kernel, with doors before loading, shut at first, and computing, open at first."""

    def __init__(self) -> None:
        self.load_door, self.forward_door = threading.Event(), threading.Event()
        self.forward_door.set()
        self.loading, self.computing = threading.Event(), threading.Event()

    def load(self, weights: ExpertWeights) -> ReferenceExperts:
        self.loading.set()
        assert self.load_door.wait(20)
        kernel = self

        class Gated(ReferenceExperts):
            def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
                kernel.computing.set()
                assert kernel.forward_door.wait(20)
                return super().forward(*arguments)

        return Gated(weights)


@pytest.fixture
def doors() -> GatedKernel:
    return GatedKernel()


@pytest.fixture
def gated(doors: GatedKernel, registry: Registry) -> ExpertGroup:
    return ExpertGroup("breast", registry, doors, device="cpu", max_resident_bytes=10**8)


def test_computes_with_the_bundle_and_layer_that_was_asked_for(
    group: ExpertGroup, registry: Registry, make_bundle: MakeBundle
) -> None:
    manifests = [registry.push(make_bundle(f"b{seed}", seed=seed, version=f"1.0.{seed}")) for seed in range(3)]
    for manifest in manifests:
        resident = group.load(manifest.digest)
        assert (resident.digest, resident.version) == (manifest.digest, manifest.version)
        assert (resident.resident_bytes, resident.kernel) == (BUNDLE_BYTES, "reference")
    assert [resident.digest for resident in group.resident()] == [manifest.digest for manifest in manifests]
    results = set()
    for seed, manifest in enumerate(manifests):
        for layer in range(2):
            output = group.forward(manifest.digest, layer, *exchange())
            weights = Bundle.open(Path(registry.root).parent / f"b{seed}").load_layer(layer)
            assert torch.equal(output, ReferenceExperts(weights).forward(*exchange()))
            results.add(tuple(output.flatten().tolist()))
    assert len(results) == 6, "each is different, so none was mistaken for another"


def test_loading_again_is_no_error(group: ExpertGroup, pushed: Manifest) -> None:
    assert group.load(pushed.digest) == group.load(pushed.digest)
    assert len(group.resident()) == 1


def test_weights_can_be_converted(registry: Registry, pushed: Manifest) -> None:
    group = ExpertGroup(
        "breast", registry, ReferenceKernel(), device="cpu", dtype=torch.bfloat16, max_resident_bytes=BUNDLE_BYTES // 2
    )
    assert group.load(pushed.digest).resident_bytes == BUNDLE_BYTES // 2
    assert group.forward(pushed.digest, 0, *exchange(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_is_not_loaded_is_refused(group: ExpertGroup, pushed: Manifest) -> None:
    with pytest.raises(BundleNotResidentError, match="not loaded in the expert group of 'breast'"):
        group.forward(pushed.digest, 0, *exchange())
    assert group.parameters_per_expert(pushed.digest) is None
    group.load(pushed.digest)
    assert group.parameters_per_expert(pushed.digest) == 3 * 16 * 24
    group.unload(pushed.digest)
    with pytest.raises(BundleNotResidentError):
        group.forward(pushed.digest, 0, *exchange())
    group.unload(pushed.digest)
    assert group.resident() == []


X, INDEX, WEIGHT = exchange()


@pytest.mark.parametrize(
    ("layer", "x", "index", "weight", "reason"),
    [
        (2, X, INDEX, WEIGHT, "layer is 2; the bundle has layers 0 to 1"),
        (-1, X, INDEX, WEIGHT, "layer is -1"),
        (0, X[0], INDEX, WEIGHT, "hidden_states has the shape"),
        (0, X[:, :8], INDEX, WEIGHT, r"hidden_states.*must be \[tokens, 16\]"),
        (0, X.double(), INDEX, WEIGHT, "hidden_states is torch.float64"),
        (0, X.bfloat16(), INDEX, WEIGHT.bfloat16(), "resident weights are torch.float32"),
        (0, X, INDEX[:3], WEIGHT[:3], r"expert_index has the shape \[3, 2\]; it must be \[5, top_k\]"),
        (0, X, INDEX[:, 0], WEIGHT[:, 0], "expert_index has the shape"),
        (0, X, INDEX.long(), WEIGHT, "expert_index is torch.int64"),
        (0, X, INDEX.float(), WEIGHT, "expert_index is torch.float32"),
        (0, X, INDEX, WEIGHT[:, :1], "weight is"),
        (0, X, INDEX, WEIGHT.bfloat16(), "weight is torch.bfloat16"),
        (0, X, INDEX.masked_fill(INDEX == 2, 3), WEIGHT, "expert_index reaches from -1 to 3"),
        (0, X, INDEX.masked_fill(INDEX == -1, -2), WEIGHT, "expert_index reaches from -2"),
    ],
)
def test_exchanges_that_do_not_fit_are_refused(
    layer: int,
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    reason: str,
    group: ExpertGroup,
    pushed: Manifest,
) -> None:
    assert {-1, 2} <= set(INDEX.flatten().tolist())
    group.load(pushed.digest)
    with pytest.raises(InvalidTensorError, match=reason):
        group.forward(pushed.digest, layer, x, index, weight)
    assert group.forward(pushed.digest, 0, *exchange()).isfinite().all(), "nothing else is disturbed"


def test_no_rows_and_no_pairs(group: ExpertGroup, pushed: Manifest) -> None:
    group.load(pushed.digest)
    x_TD, index_TK, weight_TK = exchange(0)
    assert group.forward(pushed.digest, 0, x_TD, index_TK, weight_TK).shape == (0, 16)
    x_TD, index_TK, weight_TK = exchange(4)
    assert torch.count_nonzero(group.forward(pushed.digest, 0, x_TD, index_TK[:, :0], weight_TK[:, :0])) == 0


def test_other_organs_backbones_and_damage_are_refused(registry: Registry, make_bundle: MakeBundle) -> None:
    group = ExpertGroup(
        "breast", registry, ReferenceKernel(), device="cpu", max_resident_bytes=BUNDLE_BYTES, backbone_digest="b" * 64
    )
    liver = registry.push(make_bundle("liver", organ="liver"))
    foreign = registry.push(make_bundle("foreign", version="2.0.0", backbone_digest="c" * 64))
    damaged = registry.push(make_bundle("damaged", version="3.0.0", seed=3))
    stored = registry.open(damaged.digest).locations["experts.safetensors"]
    stored.chmod(0o644)
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    for digest, kind, reason in (
        (liver.digest, InvalidBundleError, "is of organ 'liver'; this group serves 'breast'"),
        (foreign.digest, InvalidBundleError, "trained against the backbone cccccccccccc"),
        (damaged.digest, InvalidBundleError, "experts.safetensors: is damaged"),
        ("0" * 64, UnknownBundleError, "no bundle with the digest"),
    ):
        for _ in range(2):
            with pytest.raises(kind, match=reason):
                group.load(digest)
    assert group.resident() == []
    # Not a byte of room was lost on the way.
    group.load(registry.push(make_bundle("good", version="4.0.0", seed=4)).digest)


class PaddingKernel(ReferenceKernel):
    """Takes twice the room that the weights do."""

    def load(self, weights: ExpertWeights) -> ReferenceExperts:
        class Padded(ReferenceExperts):
            @property
            def nbytes(self) -> int:
                return 2 * super().nbytes

        return Padded(weights)


def test_the_limit_is_on_all_versions_together(registry: Registry, make_bundle: MakeBundle) -> None:
    first, second, third = (
        registry.push(make_bundle(f"b{seed}", seed=seed, version=f"1.0.{seed}")) for seed in range(3)
    )
    loaded: list[ExpertWeights] = []

    class CountingKernel(ReferenceKernel):
        def load(self, weights: ExpertWeights) -> ReferenceExperts:
            loaded.append(weights)
            return super().load(weights)

    group = ExpertGroup("breast", registry, CountingKernel(), device="cpu", max_resident_bytes=2 * BUNDLE_BYTES)
    group.load(first.digest)
    group.load(second.digest)
    count = len(loaded)
    with pytest.raises(ExpertCapacityError, match=f"max_resident_bytes = {2 * BUNDLE_BYTES}"):
        group.load(third.digest)
    assert len(loaded) == count, "refused before anything was allocated"
    assert [resident.digest for resident in group.resident()] == [first.digest, second.digest]
    group.unload(first.digest)
    group.load(third.digest)

    padding = ExpertGroup("breast", registry, PaddingKernel(), device="cpu", max_resident_bytes=3 * BUNDLE_BYTES)
    assert padding.load(first.digest).resident_bytes == 2 * BUNDLE_BYTES
    with pytest.raises(ExpertCapacityError):
        padding.load(second.digest)
    padding.unload(first.digest)
    padding.load(second.digest)


def test_a_load_does_not_stop_exchanges(
    gated: ExpertGroup, doors: GatedKernel, registry: Registry, make_bundle: MakeBundle
) -> None:
    first, second = (registry.push(make_bundle(f"b{n}", seed=n, version=f"1.0.{n}")) for n in range(2))
    doors.load_door.set()
    gated.load(first.digest)
    doors.load_door.clear()
    doors.loading.clear()
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(gated.load, second.digest)
        assert doors.loading.wait(20)
        for _ in range(20):
            gated.forward(first.digest, 1, *exchange())
        assert [resident.digest for resident in gated.resident()] == [first.digest], "not there before it is ready"
        with pytest.raises(BundleNotResidentError):
            gated.forward(second.digest, 0, *exchange())
        assert not load.done()
        doors.load_door.set()
        load.result(20)
    gated.forward(second.digest, 0, *exchange())


def test_two_loads_of_one_bundle_are_one(gated: ExpertGroup, doors: GatedKernel, pushed: Manifest) -> None:
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(gated.load, pushed.digest) for _ in range(4)]
        assert doors.loading.wait(20)
        assert not wait(loads, 0.05).done
        doors.load_door.set()
        assert len({load.result(20) for load in loads}) == 1
    assert len(gated.resident()) == 1


def test_waiting_loads_learn_why_it_failed(registry: Registry, pushed: Manifest) -> None:
    class Failing(GatedKernel):
        def load(self, weights: ExpertWeights) -> ReferenceExperts:
            super().load(weights)
            raise RuntimeError("out of memory")

    kernel = Failing()
    group = ExpertGroup("breast", registry, kernel, device="cpu", max_resident_bytes=BUNDLE_BYTES)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(group.load, pushed.digest)
        assert kernel.loading.wait(20)
        second = pool.submit(group.load, pushed.digest)
        time.sleep(0.05)
        kernel.load_door.set()
        for load in (first, second):
            with pytest.raises(InvalidBundleError, match="RuntimeError: out of memory"):
                load.result(20)
    with pytest.raises(InvalidBundleError, match="out of memory"):
        group.load(pushed.digest)


def test_unloading_waits_for_exchanges_and_refuses_new_ones(
    gated: ExpertGroup, doors: GatedKernel, pushed: Manifest
) -> None:
    doors.load_door.set()
    gated.load(pushed.digest)
    doors.forward_door.clear()
    doors.computing.clear()
    with ThreadPoolExecutor(2) as pool:
        under_way = pool.submit(gated.forward, pushed.digest, 0, *exchange())
        assert doors.computing.wait(20)
        unload = pool.submit(gated.unload, pushed.digest)
        while gated.resident():
            time.sleep(0.001)
        assert not wait([unload], 0.05).done
        with pytest.raises(BundleNotResidentError):
            gated.forward(pushed.digest, 0, *exchange())
        doors.forward_door.set()
        assert under_way.result(20).isfinite().all()
        unload.result(20)


def test_unloading_while_loading_unloads_what_was_loaded(
    gated: ExpertGroup, doors: GatedKernel, pushed: Manifest
) -> None:
    with ThreadPoolExecutor(2) as pool:
        load = pool.submit(gated.load, pushed.digest)
        assert doors.loading.wait(20)
        unload = pool.submit(gated.unload, pushed.digest)
        time.sleep(0.05)
        doors.load_door.set()
        load.result(20)
        unload.result(20)
    assert gated.resident() == []


def test_unloaded_weights_are_freed(registry: Registry, pushed: Manifest) -> None:
    alive: list[Any] = []

    class Watched(ReferenceExperts):
        def __init__(self, weights: ExpertWeights) -> None:
            super().__init__(weights)
            alive.append(id(self))

        def __del__(self) -> None:
            alive.remove(id(self))

    class WatchingKernel(ReferenceKernel):
        def load(self, weights: ExpertWeights) -> ReferenceExperts:
            return Watched(weights)

    group = ExpertGroup("breast", registry, WatchingKernel(), device="cpu", max_resident_bytes=BUNDLE_BYTES)
    for _ in range(3):
        group.load(pushed.digest)
        assert len(alive) == 2
        group.unload(pushed.digest)
        assert alive == []
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert registry.root not in mapped.read_text(), "the files are still mapped"


def test_many_threads_at_once(registry: Registry, make_bundle: MakeBundle) -> None:
    """Loads, unloads and exchanges of two bundles by eight threads: right results or the typed refusal, no deadlock."""
    manifests = [registry.push(make_bundle(f"b{n}", seed=n, version=f"1.0.{n}")) for n in range(2)]
    group = ExpertGroup("breast", registry, ReferenceKernel(), device="cpu", max_resident_bytes=3 * BUNDLE_BYTES)
    expected = {}
    for manifest in manifests:
        group.load(manifest.digest)
        expected[manifest.digest] = group.forward(manifest.digest, 0, *exchange())
    computed = []

    def work(seed: int) -> None:
        for step in range(40):
            digest = manifests[(seed + step // 3) % 2].digest
            try:
                if step % 3 == 0:
                    group.load(digest)
                elif step % 3 == 1:
                    assert torch.equal(group.forward(digest, 0, *exchange()), expected[digest])
                    computed.append(digest)
                elif seed % 2:
                    group.unload(digest)
            except (BundleNotResidentError, ExpertCapacityError):
                pass

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, seed) for seed in range(8)]:
            future.result(60)
    assert computed
    for manifest in manifests:
        group.unload(manifest.digest)
    assert group._state.held_bytes == 0


def test_a_bundle_that_is_not_admitted_takes_no_memory(registry: Registry, pushed: Manifest) -> None:
    asked: list[Bundle] = []

    def refuse(bundle: Bundle) -> None:
        asked.append(bundle)
        raise SignatureError("it is not signed")

    group = ExpertGroup(
        "breast", registry, ReferenceKernel(), device="cpu", max_resident_bytes=BUNDLE_BYTES, admit=refuse
    )
    with pytest.raises(SignatureError, match="not signed"):
        group.load(pushed.digest)
    assert [bundle.digest for bundle in asked] == [pushed.digest]
    assert group.resident() == []
    admitted = ExpertGroup(
        "breast", registry, ReferenceKernel(), device="cpu", max_resident_bytes=BUNDLE_BYTES, admit=asked.append
    )
    admitted.load(pushed.digest)
    assert len(asked) == 2


def test_after_a_failed_load_exchanges_say_why_until_one_succeeds(
    group: ExpertGroup, registry: Registry, make_bundle: MakeBundle, pushed: Manifest
) -> None:
    with pytest.raises(BundleNotResidentError):
        group.forward(pushed.digest, 0, *exchange())
    (file,) = (path for path in Path(registry.root).glob("files/*") if path.stat().st_size > 10_000)
    content = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(content[:-8])
    with pytest.raises(InvalidBundleError):
        group.load(pushed.digest)
    with pytest.raises(BundleUnusableError, match="is damaged or does not fit") as caught:
        group.forward(pushed.digest, 0, *exchange())
    assert str(registry.root) not in str(caught.value), "callers read it"
    failure = group.failure(pushed.digest)
    assert failure is not None
    assert "the manifest says" in failure.text
    file.write_bytes(content)
    group.load(pushed.digest)
    assert group.failure(pushed.digest) is None
    group.forward(pushed.digest, 0, *exchange())


@pytest.mark.parametrize(
    ("limit", "digest", "words"),
    [(10**8, "0" * 64, "the registry does not have the bundle"), (100, None, "leaves no room for it")],
)
def test_a_failed_load_is_told_in_words_for_callers(
    registry: Registry, pushed: Manifest, limit: int, digest: str | None, words: str
) -> None:
    group = ExpertGroup("breast", registry, ReferenceKernel(), device="cpu", max_resident_bytes=limit)
    asked = digest or pushed.digest
    with pytest.raises((UnknownBundleError, ExpertCapacityError)):
        group.load(asked)
    with pytest.raises(BundleUnusableError, match=words):
        group.forward(asked, 0, *exchange())
    group.unload(asked)
    with pytest.raises(BundleNotResidentError):
        group.forward(asked, 0, *exchange())
