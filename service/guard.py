"""Before a request is read: may it be here at all? Raw ASGI, around the hot path and around FastAPI alike."""

import time
from collections.abc import Sequence
from typing import Final, Literal

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service import errors
from service.errors import Forbidden, Unauthorized
from service.keys import Key, Keys, Right, of_secret
from service.recorder import Record
from service.settings import Settings

Need = Right | Literal["any"] | None
HEALTH: Final = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
DOCS: Final = frozenset({"/docs", "/docs/oauth2-redirect", "/openapi.json"})
METRICS: Final = frozenset({"/metrics"})
READING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
INDEX: Final = "/v2/repository/index"  # asked for with POST, and changes nothing
ADMIN: Final = "/v1/admin"
EXPLAINS: Final[dict[str, Right]] = {"explain": "explain"}  # the other verbs predict


def keys_of(settings: Settings) -> Keys:
    """`admin_key` is a key that is good for admin alone."""
    given = settings.admin_key
    return Keys(settings.api_keys, [of_secret("admin_key", given.get_secret_value(), ["admin"])] if given else ())


def open_paths(settings: Settings) -> frozenset[str]:
    """What needs no key even where there are keys."""
    public = ((settings.docs, DOCS), (settings.metrics, METRICS))
    return HEALTH.union(*(paths for exposure, paths in public if exposure == "public"))


def guard(app: ASGIApp, settings: Settings, keys: Keys) -> "Guard | None":
    """What refuses requests without a key; None where there are no keys."""
    return None if settings.api_keys is None and settings.admin_key is None else Guard(app, settings, keys)


def shielded(app: ASGIApp, settings: Settings, keys: Keys) -> ASGIApp:
    """`app` behind what the settings ask for: keys, and answers that web pages of other origins may read."""
    app = guard(app, settings, keys) or app
    if settings.cors_origins:
        headers = ("x-request-id", "retry-after", "server-timing")
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=headers,
        )
    return app


class Guard:
    """Refuses requests without a key, and leaves whose key it was in `scope["state"]["caller"]`.

    Without the setting `api_keys` it refuses none: then a key says who may change what is served, for `admin.Gate`.
    """

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys) -> None:
        self._app, self._keys, self._demands = app, keys, settings.api_keys is not None
        self._open = open_paths(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.admit(scope)
            except (Unauthorized, Forbidden) as refused:
                await errors.refused(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def admit(self, scope: Scope) -> None:
        """Raises Unauthorized and Forbidden."""
        needed = self._needed(scope)
        if needed is None:
            return
        secret = _sent(scope["headers"])
        key = None if secret is None else self._keys.find(secret)
        record: Record = scope["state"]["record"]
        if key is not None and time.time() < key.until:
            record.key, scope["state"]["caller"] = key.name, key
        if not self._demands or (key and time.time() < key.until and (needed == "any" or needed in key.rights)):
            return
        record.endpoint = scope.get("path_params", {}).get("verb") or ("admin" if needed == "admin" else "refused")
        raise _refusal(key, needed, sent=secret is not None)

    def _needed(self, scope: Scope) -> Need:
        """What a key has to be good for. None where none is needed."""
        if "path_params" in scope:  # of a verb
            return EXPLAINS.get(scope["path_params"]["verb"], "predict")
        path: str = scope["path"]
        if path in self._open:
            return None
        changes = scope["method"] not in READING and path != INDEX
        return "admin" if changes or path.startswith(ADMIN) else "any"


def _sent(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """The key in `Authorization: Bearer <key>`."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, secret = value.partition(b" ")
            return secret.strip() if scheme.lower() == b"bearer" else None
    return None


def _refusal(key: Key | None, needed: Need, *, sent: bool) -> Unauthorized | Forbidden:
    if key is None:
        return Unauthorized(
            "the key is none that is known here" if sent else "this needs a key: Authorization: Bearer <key>"
        )
    if time.time() >= key.until:
        return Unauthorized("the key has ended")
    return Forbidden(f"this needs a key with the scope {needed}; this one has {', '.join(sorted(key.rights))}")
