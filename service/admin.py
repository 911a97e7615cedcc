"""Who may change what is served: nobody unless the setting `admin` is on, then this machine, or whoever has the key."""

import hmac
from hashlib import sha256
from ipaddress import ip_address

from starlette.types import Scope

from service.errors import ControlRefused
from service.settings import Settings

KEY_HEADER = b"x-api-key"


def check(scope: Scope, settings: Settings) -> None:
    """Raise ControlRefused unless a request to change what is served may pass."""
    if not settings.admin:
        raise ControlRefused("what is served cannot be changed over HTTP here: the setting admin is off")
    headers = dict(scope["headers"])
    if settings.admin_key is not None:
        if not _is_same(headers.get(KEY_HEADER, b""), settings.admin_key.get_secret_value().encode()):
            raise ControlRefused("the header X-Api-Key has to hold the key of the setting admin_key")
    elif not _is_loopback(scope.get("client")):
        raise ControlRefused("without the setting admin_key this is for requests from the same machine alone")
    elif b"origin" in headers:  # a page in a browser on this machine is no administrator
        raise ControlRefused("without the setting admin_key this is not for web pages")


def _is_same(given: bytes, key: bytes) -> bool:
    return hmac.compare_digest(sha256(given).digest(), sha256(key).digest())


def _is_loopback(client: tuple[str, int] | None) -> bool:
    try:
        address = ip_address(client[0] if client else "")
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
