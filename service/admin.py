"""Who may change what is served. Off unless the setting `admin` is on; then this machine, or whoever has a key."""

from ipaddress import ip_address

from starlette.types import Scope

from service.errors import Forbidden, Unauthorized
from service.keys import Key
from service.settings import Settings


class Gate:
    """Stands before every request that changes what is served, behind a `guard.Guard` that looks at its key."""

    def __init__(self, settings: Settings) -> None:
        self._open, self._keyed = settings.admin, settings.api_keys is not None or settings.admin_key is not None

    def check(self, scope: Scope) -> None:
        """Raise Forbidden or Unauthorized unless the request may pass."""
        if not self._open:
            raise Forbidden("what is served cannot be changed over HTTP here: the setting admin is off")
        if self._keyed:
            caller: Key | None = scope.get("state", {}).get("caller")
            if caller is None:
                raise Unauthorized("this needs a key with the scope admin (or that of the setting admin_key)")
            if "admin" not in caller.rights:
                raise Forbidden("this needs a key with the scope admin")
        elif not _is_loopback(scope.get("client")):
            raise Forbidden("without the setting admin_key this is for requests from the same machine alone")
        elif any(name == b"origin" for name, _ in scope["headers"]):
            raise Forbidden("without the setting admin_key this is not for web pages")


def _is_loopback(client: tuple[str, int] | None) -> bool:
    if client is None:
        return False
    try:
        address = ip_address(client[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
