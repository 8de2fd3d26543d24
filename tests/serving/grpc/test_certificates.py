"""The certificates of a server, refused with a reason and replaced while it serves."""

import logging
import os
import shutil
import ssl
from pathlib import Path

import pytest

from echovlm_ray.config import TLSSection
from echovlm_ray.serving.grpc import certificates
from echovlm_ray.serving.grpc.certificates import CertificateFiles
from echovlm_ray.serving.grpc.private_file import read_private
from echovlm_ray.serving.grpc.server import GrpcServer, ServerOptions
from tests.certificates import write_certificates


def section(directory: Path, *, authority: bool = True) -> TLSSection:
    return TLSSection(
        certificate=directory / "server.pem",
        key=directory / "server.key",
        client_authority=directory / "ca.pem" if authority else None,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_certificates(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("server.pem", b"", r"gateway\.tls\.certificate .*server\.pem holds no certificate"),
        ("server.pem", b"\x30\x82 no PEM", r"gateway\.tls\.certificate .*holds no certificate"),
        ("server.key", b"no key", r"gateway\.tls\.key .*server\.key cannot be used together"),
        ("ca.pem", b"", r"gateway\.tls\.client_authority .*ca\.pem holds no certificate"),
        ("ca.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", r"client_authority .*ca\.pem"),
    ],
)
def test_what_cannot_be_used_is_named(directory: Path, name: str, content: bytes, reason: str) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        CertificateFiles(section(directory), "gateway.tls")


@pytest.mark.parametrize("name", ["server.pem", "server.key", "ca.pem"])
def test_a_file_that_is_missing_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} cannot be read: No such file"):
        CertificateFiles(section(directory))


@pytest.mark.parametrize("name", ["server.pem", "server.key", "ca.pem"])
def test_a_pipe_is_not_waited_for(directory: Path, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name, 0o600)
    with pytest.raises(ValueError, match=rf"{name} is no regular file"):
        CertificateFiles(section(directory))


@pytest.mark.parametrize(
    ("starts_in", "lasts", "reason"), [(-3600, -60, "expired on .*: renew it"), (600, 3600, "is valid only from")]
)
def test_one_that_is_not_valid_now_is_refused(tmp_path: Path, starts_in: int, lasts: int, reason: str) -> None:
    write_certificates(tmp_path, starts_in=starts_in, lasts=lasts)
    with pytest.raises(ValueError, match=f"tls.certificate .*server.pem {reason}"):
        CertificateFiles(section(tmp_path))


def test_an_authority_that_expired_is_refused_unless_another_one_is_beside_it(tmp_path: Path) -> None:
    write_certificates(tmp_path, starts_in=-3600, lasts=-60)
    expired = (tmp_path / "client.pem").read_bytes()
    write_certificates(tmp_path)
    sound = (tmp_path / "ca.pem").read_bytes()
    (tmp_path / "ca.pem").write_bytes(expired)
    with pytest.raises(ValueError, match=r"client_authority .*ca\.pem expired on"):
        CertificateFiles(section(tmp_path))
    (tmp_path / "ca.pem").write_bytes(expired + sound)
    CertificateFiles(section(tmp_path))


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_a_key_that_others_can_read_is_refused_with_what_to_type(directory: Path, mode: int) -> None:
    (directory / "server.key").chmod(mode)
    with pytest.raises(ValueError, match=f"tls.key .*chmod 600 {directory / 'server.key'}"):
        CertificateFiles(section(directory))


def serial_of(server: GrpcServer) -> str:
    port = int(server.address.rpartition(":")[2])
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=10)


def test_what_was_read_is_checked_and_not_what_has_taken_its_place_since(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    write_certificates(other)
    files = CertificateFiles(section(directory, authority=False))

    def read_and_replace(path: Path, field: str) -> bytes:
        content = read_private(path, field)
        for name in ("server.pem", "server.key"):
            shutil.copy(other / name, directory / name)
        return content

    monkeypatch.setattr(certificates, "read_private", read_and_replace)
    # The old key, and the certificate of the new one.
    assert files.changed() is None
    assert files.changed() is not None


async def test_new_connections_get_the_certificate_of_this_moment(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    import asyncio

    other = tmp_path_factory.mktemp("other")
    write_certificates(other)
    server = GrpcServer(ServerOptions(tls=section(directory, authority=False)))
    await server.start()
    first = (directory / "server.pem").read_text()
    assert await asyncio.to_thread(serial_of, server) == first
    # Half of a replacement: the key is still the old one.
    shutil.copy(other / "server.pem", directory / "server.pem")
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            assert await asyncio.to_thread(serial_of, server) == first
    assert len([record for record in caplog.records if "stay in use" in record.message]) == 1
    shutil.copy(other / "server.key", directory / "server.key")
    assert await asyncio.to_thread(serial_of, server) == (other / "server.pem").read_text()
    await server.stop(0)
