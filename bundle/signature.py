"""Who made a bundle: an Ed25519 signature of its manifest, which holds the sha256 of every other file.

The mathematics is the package `cryptography`'s (the extra 'signing'); it is imported where there is something to sign
or to verify.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import StringConstraints

from bundle.errors import BundleError, BundleUntrusted
from bundle.schema import Strict

SIGNATURE: Final = "signature.json"
SIGNATURE_BYTES: Final = 4096
_PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")


class SigningRefused(BundleError):
    """A key that is none, or cannot be read; or no package to sign and verify with."""


class Signature(Strict):
    """signature.json: the public key and the signature of the bytes of manifest.json, in hexadecimal."""

    key: Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{64}\z")]
    signature: Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{128}\z")]


def public_keys(given: Sequence[str]) -> frozenset[str]:
    """Public keys, given as 64 hexadecimal digits or as files of such lines (# begins a comment), as digits."""
    return frozenset(key for each in given for key in _keys_of(each))


def _keys_of(given: str) -> list[str]:
    if _PUBLIC_KEY.fullmatch(given):
        return [given]
    try:
        lines = [line.partition("#")[0].strip() for line in Path(given).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SigningRefused(f"the key file {given!r:.200} cannot be read: {error}") from None
    keys = [line for line in lines if line]
    wrong = next((at for at, line in enumerate(lines, start=1) if line and not _PUBLIC_KEY.fullmatch(line)), None)
    if wrong or not keys:
        place = f"line {wrong}" if wrong else "it is empty"
        raise SigningRefused(f"the key file {given!r:.200}, {place}: expected a public key of 64 hexadecimal digits")
    return keys


def refuse_untrusted(path: Path, manifest: bytes, trusted: frozenset[str]) -> None:
    """BundleUntrusted unless one of the trusted keys signed this manifest.json of the bundle in `path`."""
    file = path / SIGNATURE
    if not file.exists():
        raise BundleUntrusted(path, "it is not signed, and only bundles signed with a trusted key are accepted")
    try:
        if file.stat().st_size > SIGNATURE_BYTES:
            raise ValueError
        found = Signature.model_validate_json(file.read_bytes())
    except ValueError:  # pydantic's are of this kind, too
        raise BundleUntrusted(path, f"{SIGNATURE} does not hold a key and a signature in hexadecimal") from None
    if found.key not in trusted:
        raise BundleUntrusted(path, f"it is signed with the key {found.key}, which is not trusted")
    ed25519, invalid = _ed25519()
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(found.key))
        key.verify(bytes.fromhex(found.signature), manifest)
    except (invalid, ValueError):
        raise BundleUntrusted(path, f"{SIGNATURE} is not the signature of this manifest.json") from None


def sign(manifest: bytes, secret: str) -> Signature:
    """The signature with a secret key of 64 hexadecimal digits."""
    key = _secret_key(secret)
    return Signature(key=key.public_key().public_bytes_raw().hex(), signature=key.sign(manifest).hex())


def new_key() -> tuple[str, str]:
    """A secret key and its public key, 64 hexadecimal digits each."""
    key = _ed25519()[0].Ed25519PrivateKey.generate()
    return key.private_bytes_raw().hex(), key.public_key().public_bytes_raw().hex()


def _secret_key(secret: str) -> Any:
    if not _PUBLIC_KEY.fullmatch(secret):
        raise SigningRefused("expected a secret key of 64 hexadecimal digits, as `python -m training keygen` writes it")
    return _ed25519()[0].Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))


def _ed25519() -> tuple[Any, type[Exception]]:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise SigningRefused("signing needs the package cryptography: install the extra 'signing'") from error
    return ed25519, InvalidSignature
