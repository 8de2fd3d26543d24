"""Golden models, loaded once."""

from pathlib import Path

import pytest

from echovlm_ray import EchoVLMForConditionalGeneration
from tests.golden_cases import CASES
from tests.model.support import FullCases


@pytest.fixture(scope="session")
def golden_cases(golden_dir: Path) -> FullCases:
    return FullCases(golden_dir)


@pytest.fixture(scope="session")
def golden_models(golden_dir: Path) -> dict[str, EchoVLMForConditionalGeneration]:
    return {
        variant: EchoVLMForConditionalGeneration.from_pretrained(golden_dir / variant / "checkpoint")
        for variant in CASES
    }
