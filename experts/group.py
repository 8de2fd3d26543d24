"""The loaded versions of one organ's experts, and the computation with them."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from experts.bundles.bundle import Bundle
from experts.bundles.convert import check_dtype, convert_experts, dtype_name
from experts.bundles.manifest import Manifest, OtherDtype
from experts.errors import BundleNotResidentError, BundleUnusableError, ExpertCapacityError, InvalidBundleError
from experts.kernels.base import ExpertKernel, PreparedExperts, kernel_in_use
from experts.load_failure import LoadFailure
from experts.loaded import LoadedBundle, Resident
from experts.warm_up import warm_up


class BundleStore(Protocol):
    """The source of bundles: a `Registry`, or `KeptBundles` on top of one."""

    def open(self, digest: str) -> Bundle:
        """Opens the bundle with a digest. Raises the errors of `Registry.open`."""


# More versions than one organ ever needs at a time.
_MAX_FAILURES = 16

DEFAULT_TOP_K = 2


@dataclass(slots=True)
class _State:
    """The state that the group's lock guards."""

    entries: dict[str, LoadedBundle] = field(default_factory=dict)
    loading: dict[str, Future[Resident]] = field(default_factory=dict)
    # Progress of the running loads, from 0 to 1.
    progress: dict[str, float] = field(default_factory=dict)
    # Why the last load of a bundle failed.
    failures: dict[str, LoadFailure] = field(default_factory=dict)
    # Bytes of all bundles that are loaded, being loaded, or being unloaded.
    held_bytes: int = 0


class _Progress:
    """The progress of a load: the first half is reading and checking the files, the second preparing the layers."""

    def __init__(self, state: _State, digest: str, manifest: Manifest) -> None:
        self._progress = state.progress
        self._digest = digest
        self._size_bytes = max(manifest.size_bytes, 1)
        self._num_layers = manifest.num_layers
        self._read_bytes = 0
        self._layers = 0

    def add_read(self, count: int) -> None:
        self._read_bytes += count
        self._note()

    def add_layer(self) -> None:
        self._layers += 1
        self._note()

    def _note(self) -> None:
        read = min(self._read_bytes / self._size_bytes, 1.0)
        self._progress[self._digest] = 0.5 * read + 0.5 * self._layers / self._num_layers


class ExpertGroup:
    """Holds several versions of one organ's experts. Thread-safe.

    The lock is held for look-ups only: a call never waits for a load or for another call.

    Attributes:
        organ: the organ of the experts.
    """

    def __init__(
        self,
        organ: str,
        registry: BundleStore,
        kernel: ExpertKernel,
        *,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        other_dtype: OtherDtype = "convert",
        top_k: int = DEFAULT_TOP_K,
        max_resident_bytes: int,
        backbone_digest: str | None = None,
        admit: Callable[[Bundle], None] | None = None,
    ) -> None:
        """
        Args:
            organ: bundles of any other organ are refused.
            registry: the source of bundles.
            kernel: computes the experts.
            device: the device of the weights.
            dtype: the dtype of callers' hidden states, to which weights are converted. With None the weights keep their
                dtype, and callers must use that.
            other_dtype: "refuse" refuses bundles whose experts or gate rows have another dtype.
            top_k: experts per token in the warm-up.
            max_resident_bytes: a load that would take the weights of all versions together above this is refused.
            backbone_digest: when set, bundles that were trained against another backbone are refused.
            admit: when set, called with every bundle before it is loaded; raises if a policy forbids it, like
                `experts.bundles.signing.SignaturePolicy.admit`.
        """
        self.organ = organ
        self._registry = registry
        self._kernel = kernel
        self._device = torch.device(device)
        self._dtype = dtype
        self._other_dtype: OtherDtype = other_dtype
        self._top_k = top_k
        self._max_resident_bytes = max_resident_bytes
        self._backbone_digest = backbone_digest
        self._admit = admit
        self._changed = threading.Condition()
        self._state = _State()

    def load(self, digest: str) -> Resident:
        """Checks and loads a bundle; returns when it can be used.

        It counts as loaded only after it has answered calls in every layer: see `experts.warm_up`.

        Idempotent: a running load of the same bundle is waited for.

        Raises:
            UnknownBundleError: it is not in the registry.
            InvalidBundleError: it belongs to another organ or backbone, has a dtype that must not be converted, is
                damaged, is not admitted, or cannot be computed here.
            ExpertCapacityError: the memory limit does not allow it; nothing was allocated.
        """
        with self._changed:
            if entry := self._state.entries.get(digest):
                return entry.resident
            under_way = self._state.loading.get(digest)
            if under_way is None:
                own: Future[Resident] = Future()
                self._state.loading[digest] = own
        if under_way is not None:
            return under_way.result()
        try:
            entry = self._load(digest)
        except BaseException as error:
            with self._changed:
                del self._state.loading[digest]
                self._state.progress.pop(digest, None)
                self._note_failure(digest, error)
                self._changed.notify_all()
            own.set_exception(error)
            raise
        with self._changed:
            del self._state.loading[digest]
            self._state.progress.pop(digest, None)
            self._state.entries[digest] = entry
            self._state.failures.pop(digest, None)
            self._changed.notify_all()
        own.set_result(entry.resident)
        return entry.resident

    def unload(self, digest: str) -> None:
        """Unloads a bundle; returns when its running calls have ended and its memory is free.

        New calls are refused immediately. Does nothing if the bundle is not loaded; one that is being loaded is
        unloaded afterwards.
        """
        with self._changed:
            self._changed.wait_for(lambda: digest not in self._state.loading)
            self._state.failures.pop(digest, None)
            entry = self._state.entries.pop(digest, None)
            if entry is None:
                return
            self._changed.wait_for(lambda: entry.running_calls == 0)
        # Freeing memory takes a while, and calls must not wait for it.
        entry.layers.clear()
        with self._changed:
            self._state.held_bytes -= entry.resident.resident_bytes

    def forward(
        self,
        digest: str,
        layer: int,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> torch.Tensor:
        """Computes `Σ_k weight · SwiGLU_k(x)` with one layer of a loaded bundle.

        Args:
            digest: the bundle.
            layer: the decoder layer, from 0.
            x_TD: tokens × hidden, in the loaded weights' dtype; on any device.
            expert_index_TK: int32, from 0; `NO_EXPERT` for pairs of other groups.
            weight_TK: in x's dtype.

        Returns:
            tokens × hidden, in x's dtype and on its device.

        Raises:
            BundleNotResidentError: the bundle is not loaded.
            BundleUnusableError: it is not loaded because its last load failed.
            InvalidTensorError: a layer, shape, dtype or expert index does not fit the bundle.
        """
        with self._in_use(digest) as entry:
            return entry.forward(digest, layer, x_TD, expert_index_TK, weight_TK)

    def resident(self) -> list[Resident]:
        """The loaded bundles, in the order of loading."""
        with self._changed:
            return [entry.resident for entry in self._state.entries.values()]

    def loading(self) -> dict[str, float]:
        """The running loads: digest → progress from 0 to 1."""
        with self._changed:
            return {digest: self._state.progress.get(digest, 0.0) for digest in self._state.loading}

    def failure(self, digest: str) -> LoadFailure | None:
        """Why the last load of a bundle failed; None if it did not, or is being retried."""
        with self._changed:
            return None if digest in self._state.loading else self._state.failures.get(digest)

    @property
    def max_resident_bytes(self) -> int:
        """The limit for the weights of all versions, in bytes."""
        return self._max_resident_bytes

    def parameters_per_expert(self, digest: str) -> int | None:
        """The number of parameters of one expert in one layer, which is the cost of a pair. None if the bundle is not
        loaded.
        """
        with self._changed:
            entry = self._state.entries.get(digest)
        return None if entry is None else entry.parameters_per_expert(digest)

    @contextmanager
    def _in_use(self, digest: str) -> Iterator[LoadedBundle]:
        with self._changed:
            entry = self._state.entries.get(digest)
            if entry is None:
                failure = self._state.failures.get(digest)
                if failure is not None and digest not in self._state.loading:
                    raise BundleUnusableError(self.organ, digest, failure.reason)
                raise BundleNotResidentError(
                    f"bundle {digest[:100]!r} is not loaded in the expert group of {self.organ!r}; load it first"
                )
            entry.running_calls += 1
        try:
            yield entry
        finally:
            with self._changed:
                entry.running_calls -= 1
                if entry.running_calls == 0:
                    self._changed.notify_all()

    def _note_failure(self, digest: str, error: BaseException) -> None:
        failures = self._state.failures
        failures.pop(digest, None)
        failures[digest] = LoadFailure.of(error)
        if len(failures) > _MAX_FAILURES:
            del failures[next(iter(failures))]

    def _load(self, digest: str) -> LoadedBundle:
        bundle = self._registry.open(digest)
        manifest = bundle.manifest
        self._check_fits(manifest)
        if self._admit is not None:
            self._admit(bundle)
        dtype = self._dtype or manifest.torch_dtype
        check_dtype(manifest, dtype, self._other_dtype)
        reserved = manifest.num_expert_parameters * dtype.itemsize
        self._reserve(reserved, manifest)
        try:
            progress = _Progress(self._state, digest, manifest)
            bundle.verify(read=progress.add_read)
            layers = []
            for layer in range(manifest.num_layers):
                layers.append(self._prepare(bundle, layer, dtype))
                progress.add_layer()
            resident_bytes = sum(prepared.nbytes for prepared in layers)
            # A kernel may have padded or repacked the weights.
            self._reserve(resident_bytes - reserved, manifest)
            reserved = resident_bytes
            resident = Resident(
                digest,
                manifest.name,
                manifest.version,
                resident_bytes,
                kernel_in_use(self._kernel, layers[0]),
                dtype_name(dtype),
                manifest.dtype,
            )
            entry = LoadedBundle(resident, manifest, dtype, self._device, layers)
            warm_up(entry, bundle, dtype=dtype, top_k=self._top_k)
        except BaseException:
            with self._changed:
                self._state.held_bytes -= reserved
            raise
        return entry

    def _check_fits(self, manifest: Manifest) -> None:
        if manifest.organ != self.organ:
            raise InvalidBundleError(
                f"bundle {manifest.name} {manifest.version} is of organ {manifest.organ!r}; this group serves "
                f"{self.organ!r}"
            )
        if self._backbone_digest not in (None, manifest.backbone_digest):
            raise InvalidBundleError(
                f"bundle {manifest.name} {manifest.version} was trained against the backbone "
                f"{manifest.backbone_digest[:12]}…; this group serves {str(self._backbone_digest)[:12]}…"
            )

    def _reserve(self, extra_bytes: int, manifest: Manifest) -> None:
        with self._changed:
            held = self._state.held_bytes + extra_bytes
            if extra_bytes > 0 and held > self._max_resident_bytes:
                raise ExpertCapacityError(
                    f"bundle {manifest.name} {manifest.version} would take the resident weights of {self.organ!r} to "
                    f"{held} bytes, above the limit max_resident_bytes = {self._max_resident_bytes}; unload a version "
                    "or raise the limit"
                )
            self._state.held_bytes = held

    def _prepare(self, bundle: Bundle, layer: int, dtype: torch.dtype) -> PreparedExperts:
        title = f"bundle {bundle.manifest.name} {bundle.manifest.version}"
        try:
            return self._kernel.load(convert_experts(bundle.load_layer(layer), dtype, self._device, layer))
        except InvalidBundleError:
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ExpertCapacityError(f"{title} does not fit into the memory of {self._device}") from error
        except Exception as error:
            # A kernel may come from another package. Its error is about weights only, and operators need it.
            raise InvalidBundleError(
                f"{title}, layer {layer}: the kernel {self._kernel.name} cannot load it in {dtype_name(dtype)} on "
                f"{self._device}: {type(error).__name__}: {str(error)[:500]}"
            ) from error
