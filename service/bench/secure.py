"""TLS to a service that is measured."""

import ssl
from pathlib import Path

from service.bench.requests import BenchRefused


def trusting(ca: Path | None) -> ssl.SSLContext:
    """Trusts those whose certificates are in a PEM file, or whom this system trusts. Raises BenchRefused."""
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__
        raise BenchRefused(f"--ca {str(ca)!r}: expected a file of PEM certificates ({reason})") from None


def anybody() -> ssl.SSLContext:
    """Encrypts, and asks nobody who it is."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
