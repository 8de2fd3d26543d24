"""The certificates of a TLS server: checked before they are used, and reloaded when they change."""

import logging
import os
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc

from echovlm_ray.config import TLSSection
from echovlm_ray.serving.grpc.private_file import read_private

logger = logging.getLogger(__name__)


class CertificateFiles:
    """The files of one TLS section, as they are now."""

    def __init__(self, tls: TLSSection, name: str = "tls") -> None:
        """
        Args:
            tls: where they are.
            name: what the configuration calls the section, for example gateway.tls.

        Raises:
            ValueError: one of them cannot be used; the text names it and the reason.
        """
        self._tls = tls
        self._name = name
        # gRPC calls this on its own threads, one for each new connection.
        self._lock = threading.Lock()
        self._contents = self._read()
        self._refused: tuple[bytes, ...] | str = ""
        self._check(self._contents)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for a server that reloads the files for new connections.

        While the files are invalid, the last valid ones stay in use, and the reason is logged.
        """
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._contents), self.changed, require_client_authentication=self._authority is not None
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration if the files have changed; called by gRPC."""
        with self._lock:
            contents: tuple[bytes, ...] = ()
            try:
                contents = self._read()
                if contents == self._contents:
                    return None
                self._check(contents)
            except ValueError as error:
                # Once for each thing that is wrong, not for each connection.
                if self._refused != (contents or str(error)):
                    self._refused = contents or str(error)
                    logger.error("%s; the certificates before stay in use", error)
                return None
            self._contents, self._refused = contents, ""
            logger.info("new certificates of %s are in use", self._name)
            return _configuration(contents)

    @property
    def _authority(self) -> Path | None:
        return self._tls.client_authority

    def _read(self) -> tuple[bytes, ...]:
        """Key, certificate, and the authority's certificates where there are some."""
        key = read_private(self._tls.key, f"{self._name}.key")
        others = [("certificate", self._tls.certificate), ("client_authority", self._authority)]
        return key, *(_read(path, f"{self._name}.{field}") for field, path in others if path is not None)

    def _check(self, contents: tuple[bytes, ...]) -> None:
        _check_dates(contents[1], f"{self._name}.certificate {self._tls.certificate}", all)
        if self._authority is not None:
            # A file of authorities may contain outdated ones.
            _check_dates(contents[2], f"{self._name}.client_authority {self._authority}", any)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            with _in_memory(contents[1]) as certificate, _in_memory(contents[0]) as key:
                # A key that is encrypted would ask for its password on the terminal.
                context.load_cert_chain(certificate, key, password=lambda: b"")
        except (ssl.SSLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ValueError(
                f"{self._name}.certificate {self._tls.certificate} and {self._name}.key {self._tls.key} cannot be used "
                f"together: {reason}; both must be PEM and belong together, and the key must have no password"
            ) from None


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A path for what was read: `ssl` loads nothing else, and the file may hold something else by now."""
    with open(os.memfd_create("tls"), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _configuration(contents: tuple[bytes, ...]) -> grpc.ServerCertificateConfiguration:
    key, certificate, *authority = contents
    return grpc.ssl_server_certificate_configuration(
        [(key, certificate)], root_certificates=authority[0] if authority else None
    )


def _read(path: Path, field: str) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{field} {path} is no regular file: give the path of one")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{field} {path} cannot be read: {error.strerror}") from None


def _check_dates(content: bytes, what: str, enough: Callable[[Iterable[bool]], bool]) -> None:
    """Refuses a file without a certificate, or without enough certificates that are valid now."""
    from cryptography import x509

    try:
        certificates = x509.load_pem_x509_certificates(content)
    except ValueError:
        raise ValueError(f"{what} holds no certificate that can be read: give a PEM file of certificates") from None
    now = datetime.now(UTC)
    if enough(found.not_valid_before_utc <= now <= found.not_valid_after_utc for found in certificates):
        return
    if expired := [found.not_valid_after_utc for found in certificates if found.not_valid_after_utc < now]:
        raise ValueError(f"{what} expired on {min(expired):%Y-%m-%d %H:%M} UTC: renew it")
    begins = max(found.not_valid_before_utc for found in certificates)
    raise ValueError(f"{what} is valid only from {begins:%Y-%m-%d %H:%M} UTC: check this machine's clock")
