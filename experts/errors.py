"""Errors of an expert group."""

# The reason that a replica gives in `google.rpc.ErrorInfo` for a `BundleUnusableError`.
BUNDLE_UNUSABLE = "BUNDLE_UNUSABLE"


class InvalidBundleError(ValueError):
    """A bundle is invalid or does not match its manifest. The text names the file and the reason."""


class ProbeError(InvalidBundleError):
    """A bundle's self-test failed: a kernel's outputs differ from the recorded ones."""


class SignatureError(InvalidBundleError):
    """A bundle is not signed as the policy requires. The text names the problem."""


class WarmUpError(InvalidBundleError):
    """A loaded bundle failed a router's calls. The text names the layer and the cause."""


class UnknownBundleError(LookupError):
    """There is no such bundle in the registry. The text names the bundle and lists the existing ones."""


class RegistryError(ValueError):
    """A registry's address or options are invalid. The text names the address and the reason."""


class RegistryFullError(RegistryError):
    """The disk of a registry, or of its upload folder, is full. The text names the folder."""


class RegistryUnavailableError(RegistryError):
    """The registry is unreachable or refuses access. The text names the registry and the reason."""


class BundleNotResidentError(LookupError):
    """A call needs a bundle that this replica has not loaded."""


class BundleUnusableError(BundleNotResidentError):
    """A call needs a bundle that this replica failed to load.

    Attributes:
        organ: the bundle's organ.
        reason: the reason for callers, without paths or addresses.
    """

    def __init__(self, organ: str, digest: str, reason: str) -> None:
        """Names the bundle and the reason."""
        super().__init__(f"bundle {digest[:100]!r} could not be loaded in the expert group of {organ!r}: {reason}")
        self.organ = organ
        self.reason = reason


class ExpertCapacityError(RuntimeError):
    """A limit of an expert replica is reached. The text names the limit."""


class InvalidTensorError(ValueError):
    """A received tensor is malformed, or does not have the expected shape or dtype. The text names the difference."""
