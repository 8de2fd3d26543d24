"""Errors of an expert group."""

# The reason that a replica gives in `google.rpc.ErrorInfo` for a `BundleUnusableError`.
BUNDLE_UNUSABLE = "BUNDLE_UNUSABLE"


class InvalidBundleError(ValueError):
    """A bundle is not what its manifest says, or not what it must be. The text names the file and the reason."""


class ProbeError(InvalidBundleError):
    """A bundle's self-test failed: what a kernel computes with its weights is not what was recorded."""


class SignatureError(InvalidBundleError):
    """A bundle is not signed as the policy demands. The text says what is missing or wrong."""


class WarmUpError(InvalidBundleError):
    """A bundle that was loaded cannot answer what a router would send. The text names the layer and the cause."""


class UnknownBundleError(LookupError):
    """No such bundle in the registry. The text names what was asked for and what there is."""


class RegistryError(ValueError):
    """A registry's address or its options cannot be used. The text names the address and the reason."""


class RegistryFullError(RegistryError):
    """A registry, or the folder for bundles on their way to it, has no room. The text says where to make some."""


class RegistryAwayError(RegistryError):
    """The registry cannot be read now: out of reach, or not permitted. The text names the registry and the reason."""


class BundleNotResidentError(LookupError):
    """An exchange asked for a bundle that this replica has not loaded."""


class BundleUnusableError(BundleNotResidentError):
    """An exchange asked for a bundle that this replica tried to load and could not.

    Attributes:
        organ: whose experts it has.
        reason: why, in words for callers: without paths or addresses.
    """

    def __init__(self, organ: str, digest: str, reason: str) -> None:
        """Names the bundle and says why it cannot be used."""
        super().__init__(f"bundle {digest[:100]!r} could not be loaded in the expert group of {organ!r}: {reason}")
        self.organ = organ
        self.reason = reason


class ExpertCapacityError(RuntimeError):
    """A limit of an expert replica is reached; the text names the limit. Nothing else is disturbed."""


class InvalidTensorError(ValueError):
    """A tensor that arrived is not what it says, or not what its place needs. The text names the difference."""
