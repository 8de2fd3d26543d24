"""The location of a bundle, in a form that can be sent to another process."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experts.bundles.bundle import Bundle
from experts.errors import InvalidBundleError, UnknownBundleError
from experts.registry.registry import DEFAULT_CACHE_BYTES, Registry


class RegistryLocation(BaseModel):
    """A registry: everything that `Registry` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str
    # For fsspec's file system; credentials are better kept in the environment.
    options: dict[str, str | int | bool] = {}
    cache_directory: Path | None = None
    cache_bytes: Annotated[int, Field(ge=1)] = DEFAULT_CACHE_BYTES
    # Roots of registries that are read where this one does not have a bundle.
    fallbacks: tuple[str, ...] = ()

    def open(self) -> Registry:
        """The registry.

        Raises:
            RegistryError: there is no file system for the root, or an option is wrong.
        """
        return Registry(
            self.root,
            options=self.options,
            cache_directory=self.cache_directory,
            cache_bytes=self.cache_bytes,
            fallbacks=[Registry(root) for root in self.fallbacks],
        )


class BundleSource(BaseModel):
    """A bundle: a folder, or a digest in a registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path | None = None
    registry: RegistryLocation | None = None
    digest: str | None = None
    # A folder with a copy of the registry's bundle, which is taken where the registry cannot give it.
    copy_folder: Path | None = None

    @model_validator(mode="after")
    def _is_one_place(self) -> Self:
        in_registry = self.registry is not None and self.digest is not None
        if in_registry == (self.folder is not None) or (self.registry is None) != (self.digest is None):
            raise ValueError("a bundle is either in a folder or in a registry under a digest")
        return self

    def open(self) -> Bundle:
        """The bundle.

        Raises:
            UnknownBundleError: the registry does not have it.
            InvalidBundleError: there is no sound manifest, or a file is missing.
        """
        if self.folder is not None:
            return Bundle.open(self.folder)
        assert self.registry is not None
        assert self.digest is not None
        try:
            return self.registry.open().open(self.digest)
        except (UnknownBundleError, OSError):
            copied = self._copy()
            if copied is None:
                raise
            return copied

    def _copy(self) -> Bundle | None:
        """The copy, if it is whole."""
        if self.copy_folder is None or not self.copy_folder.is_dir():
            return None
        try:
            bundle = Bundle.open(self.copy_folder)
        except InvalidBundleError:
            return None
        whole = all(path.is_file() for path in bundle.locations.values())
        return bundle if whole and bundle.digest == self.digest else None
