import pytest

from echovlm_ray.config import Config
from echovlm_ray.hosts import host_port, is_loopback


@pytest.mark.parametrize(
    ("host", "text"), [("127.0.0.1", "127.0.0.1:5"), ("::1", "[::1]:5"), ("fe80::2", "[fe80::2]:5"), ("a.b", "a.b:5")]
)
def test_an_ipv6_literal_stands_in_brackets(host: str, text: str) -> None:
    assert host_port(host, 5) == text


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("localhost", True),
        ("::1", True),
        ("0:0:0:0:0:0:0:1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_loopback_is_known_however_it_is_written(host: str, found: bool) -> None:
    assert is_loopback(host) is found


@pytest.mark.parametrize("part", ["gateway", "control"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway.example"])
def test_what_others_reach_needs_to_know_who_calls(part: str, host: str) -> None:
    tls = {"certificate": "a.pem", "key": "a.key"}
    with pytest.raises(ValueError, match=rf"{part}\.host is .* nothing says who may call: set {part}\.token_file"):
        Config.model_validate({part: {"host": host, "tls": tls}})
    Config.model_validate({part: {"host": host, "tls": tls, "token_file": "tokens"}})
    Config.model_validate({part: {"host": host, "tls": {**tls, "client_authority": "ca.pem"}}})
    Config.model_validate({part: {"host": "::1", "tls": tls}})
