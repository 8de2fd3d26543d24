"""EchoVLM-Ray serves a vision-language model for ultrasound on Ray; each organ's experts can be replaced separately.

The model's classes are imported on first use, because a client of the service needs neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echovlm_ray.model.configuration import EchoVLMConfig
    from echovlm_ray.model.modeling import EchoVLMForConditionalGeneration
    from echovlm_ray.model.processing import EchoVLMProcessor

__all__ = ["EchoVLMConfig", "EchoVLMForConditionalGeneration", "EchoVLMProcessor"]

_MODULES = {
    "EchoVLMConfig": "echovlm_ray.model.configuration",
    "EchoVLMForConditionalGeneration": "echovlm_ray.model.modeling",
    "EchoVLMProcessor": "echovlm_ray.model.processing",
}


def __getattr__(name: str) -> Any:
    """Imports one of the model's classes.

    Raises:
        ImportError: torch or transformers is not installed; the text has the command to install it.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise ImportError(
            f"echovlm_ray.{name} needs {error.name}, which the client alone does not: pip install 'echovlm-ray[serve]'"
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
