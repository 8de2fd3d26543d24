"""The token that a command takes from a token file, and the options that a server's configuration asks of commands."""

from pathlib import Path

import pytest

from echovlm_ray.cli.credentials import options_for, token_of
from echovlm_ray.config import ControlSection, GatewaySection, TLSSection
from echovlm_ray.serving.grpc.auth import BearerTokens


@pytest.mark.parametrize(
    "text",
    ["first\n", "# mine\n\nfirst  night-batch\nsecond\n", "first\tnight batch\r\nsecond\r\n", "\ufefffirst name\n"],
    ids=["alone", "with a name", "of another system", "with a byte order mark"],
)
def test_the_servers_own_file_will_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens"
    path.touch(0o600)
    path.write_bytes(text.encode())
    assert token_of(path) == "first"
    assert BearerTokens(path).check([("authorization", f"Bearer {token_of(path)}")])


def test_a_file_without_a_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("# none\n")
    with pytest.raises(ValueError, match="holds no token"):
        token_of(tmp_path / "tokens")


def test_the_options_that_a_server_asks_for() -> None:
    pair = {"certificate": Path("server.pem"), "key": Path("server.key")}
    assert options_for(GatewaySection()) == ""
    assert options_for(ControlSection(token_file=Path("my tokens"))) == " --token-file 'my tokens'"
    assert options_for(GatewaySection(tls=TLSSection(**pair))) == " --ca AUTHORITY.pem"
    both = TLSSection(**pair, client_authority=Path("ca.pem"))
    assert options_for(GatewaySection(tls=both, token_file=Path("tokens"))) == (
        " --ca AUTHORITY.pem --certificate CERTIFICATE.pem --key KEY.pem --token-file tokens"
    )
