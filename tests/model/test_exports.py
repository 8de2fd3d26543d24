import subprocess
import sys
from pathlib import Path

import pytest

import echovlm_ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["EchoVLMConfig", "EchoVLMForConditionalGeneration", "EchoVLMProcessor"])
def test_the_package_exports_the_models_classes(name: str) -> None:
    assert getattr(echovlm_ray, name).__name__ == name
    assert name in dir(echovlm_ray)


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'EchoVLM'"):
        _ = echovlm_ray.EchoVLM


def test_without_torch_the_package_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import echovlm_ray\n"
        "try:\n    echovlm_ray.EchoVLMConfig\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "pip install 'echovlm-ray[serve]'" in done.stdout
