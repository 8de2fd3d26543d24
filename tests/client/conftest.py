from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import write_certificates
from tests.client.scripted_server import ScriptedEchoVLM, serving


@pytest.fixture
def servicer() -> ScriptedEchoVLM:
    return ScriptedEchoVLM()


@pytest.fixture
def address(servicer: ScriptedEchoVLM) -> Iterator[str]:
    with serving(servicer) as found:
        yield found


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    write_certificates(directory)
    return directory
