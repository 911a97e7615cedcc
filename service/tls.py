"""The certificate that the service shows, where it speaks TLS itself."""

import logging
import ssl
from pathlib import Path
from typing import Final

from service.settings import Settings

CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2: those with forward secrecy; 1.3 has no others

log = logging.getLogger(__name__)


class TlsRefused(Exception):
    """A certificate or key that cannot be used; the text is for the person who runs the service."""


class Tls:
    """`context` is for the life of the service; a `renew` lets connections from then on see another certificate."""

    def __init__(self, certificate: Path, key: Path | None) -> None:
        self._certificate, self._key = certificate, key
        self.context = _context(certificate, key)

    @classmethod
    def of(cls, settings: Settings) -> "Tls | None":
        """Raises TlsRefused."""
        if settings.tls_cert is not None:
            return cls(settings.tls_cert, settings.tls_key)
        if settings.tls_key is not None:
            raise TlsRefused("tls_key is set without tls_cert: a key serves nothing without its certificate")
        return None

    def renew(self) -> None:
        """Read both files again. What cannot be used is logged, and changes nothing."""
        try:
            _context(self._certificate, self._key)  # aside: a pair that does not fit would spoil the one in use
            _load(self.context, self._certificate, self._key)
        except TlsRefused as refused:
            log.error("certificate not read", extra={"facts": {"reason": str(refused)}})
        else:
            log.info("certificate read")


def _context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    _load(context, certificate, key)
    return context


def _load(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    try:
        context.load_cert_chain(certificate, key, password="")  # or OpenSSL would ask the terminal for one
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__
        raise TlsRefused(
            f"the certificate in {str(certificate)!r} with the key in {str(key or certificate)!r} cannot be used "
            f"({reason}): expected PEM files, the certificate first and then those between it and a root, and the key "
            "that it is for, without a password"
        ) from None
