"""A tiny start and a few records, made once."""

from pathlib import Path

import pytest
import torch

from tests.training.support import write_records, write_start


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start") / "tiny")


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten records, one of them without a picture."""
    return write_records(tmp_path_factory.mktemp("records"), 10, without_image=(3,))
