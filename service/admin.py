"""Who may change what is served. Off unless the setting `admin` is on; then this machine, or whoever has the key."""

import hmac
from hashlib import sha256
from ipaddress import ip_address

from starlette.types import Scope

from service.errors import Forbidden
from service.settings import Settings


class Gate:
    """Stands before every request that changes what is served."""

    def __init__(self, settings: Settings) -> None:
        self._open = settings.admin
        key = settings.admin_key
        self._digest = sha256(key.get_secret_value().encode()).digest() if key else None

    def check(self, scope: Scope) -> None:
        """Raise Forbidden unless the request may pass."""
        headers = dict(scope["headers"])
        if not self._open:
            raise Forbidden("what is served cannot be changed over HTTP here: the setting admin is off")
        if self._digest is not None:
            if not hmac.compare_digest(sha256(_key(headers)).digest(), self._digest):
                raise Forbidden("Authorization: Bearer has to give the key of the setting admin_key")
        elif not _is_loopback(scope.get("client")):
            raise Forbidden("without the setting admin_key this is for requests from the same machine alone")
        elif b"origin" in headers:
            raise Forbidden("without the setting admin_key this is not for web pages")


def _key(headers: dict[bytes, bytes]) -> bytes:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _is_loopback(client: tuple[str, int] | None) -> bool:
    if client is None:
        return False
    try:
        address = ip_address(client[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
