"""Checks that the bundles of a past expert set are present, undamaged and admitted."""

from collections.abc import Callable, Collection, Mapping

from experts.bundles.bundle import Bundle
from experts.errors import InvalidBundleError, UnknownBundleError
from experts.registry.registry import Registry, reading_registry
from router.errors import ReplayRefusedError
from router.gating.expert_set import ExpertSet, ExpertSetMember

MAX_VERSION = 64


class ReplayCheck:
    """Checks bundles in the registry, not in local copies. Thread-safe."""

    def __init__(self, registry: Registry, admit: Callable[[Bundle], None], version_of: Callable[[str], str]) -> None:
        """Takes the registry, the signature policy, and digest → version, "" if unknown."""
        self._registry = registry
        self._admit = admit
        self._version_of = version_of

    def check(
        self, expert_set: ExpertSet, used: Collection[str], serving: Collection[str], versions: Mapping[str, str]
    ) -> None:
        """Checks every member that is not live. Blocks while it reads the used ones.

        Args:
            expert_set: the set.
            used: the organs whose experts are used; the other organs' gate rows are checked by Routers.
            serving: digests that are live or checked already.
            versions: digest → version from the caller, for bundles whose version is unknown here.

        Raises:
            ReplayRefusedError: names the organ, the version and the reason.
            RegistryUnavailableError: the registry cannot be read.
        """
        for member in expert_set.members:
            if member.bundle_digest not in serving:
                self._check(member, member.organ in used, versions.get(member.bundle_digest, ""))

    def _check(self, member: ExpertSetMember, is_used: bool, given_version: str) -> None:
        digest = member.bundle_digest
        try:
            with reading_registry(self._registry.root):
                bundle = self._registry.open(digest)
            self._admit(bundle)
            if is_used:
                bundle.verify_files()
        except UnknownBundleError:
            reason = "is not in the registry any more: push the same bundle again"
        except InvalidBundleError as error:
            reason = f"cannot be used any more: {error}"
        else:
            return
        raise ReplayRefusedError(member.organ, self._name(digest, given_version), reason)

    def _name(self, digest: str, given: str) -> str:
        version = self._version_of(digest)
        if not version and given.isprintable() and len(given) <= MAX_VERSION:
            version = given
        return f"{version} ({digest[:12]}…)" if version else f"{digest[:12]}… (version unknown)"
