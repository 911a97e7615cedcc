"""The hot path: POST :predict, :rank and :explain in raw ASGI, before FastAPI sees them.

A prediction of few rows is read on the event loop and scored by its version's batcher together with others. Whatever
takes longer (a long or compressed body, many rows, a ranking, an explanation) has a worker thread to itself, so that
/livez stays quick.
"""

import asyncio
import os
import re
import zlib
from collections.abc import Callable
from typing import Final, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from bundle import InputError
from service import errors, scorer
from service.catalog import Catalog
from service.errors import BodyEncoded, BodyTooLarge, BodyUnreadable, ServiceError
from service.explainer import explain
from service.ranker import rank
from service.recorder import Record
from service.runtime import Runtime, Verb
from service.settings import Settings

T = TypeVar("T")

ADDRESS: Final = re.compile(
    r"/v1/models/(?P<model>[^/]+?)(?:/versions/(?P<version>[^/]+))?:(?P<verb>predict|explain|rank)"
)
INLINE_BYTES: Final = 65_536  # a body up to this long is read on the event loop, in half a millisecond at most
GZIP: Final = 16 + zlib.MAX_WBITS
ACTS: Final[dict[Verb, Callable[[Runtime, bytes, Settings], bytes]]] = {
    "predict": scorer.predict,
    "explain": explain,
    "rank": rank,
}


def is_verb(scope: Scope) -> bool:
    """Whether a request is for the Front, which then finds model, version and verb in `scope["path_params"]`."""
    found = ADDRESS.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
    if found:
        scope["path_params"] = found.groupdict()
    return found is not None


class Front:
    """Answers the verbs: an ASGI app that stands in a Recorder."""

    def __init__(self, catalog: Catalog, settings: Settings) -> None:
        self._catalog, self._settings = catalog, settings
        self._turns = CapacityLimiter(os.cpu_count() or 1)  # more threads would only take turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content = await self._answer(scope, receive, **scope["path_params"])
        except (ServiceError, InputError) as error:
            await errors.refused(error)(scope, receive, send)
            return
        headers = [(b"content-length", b"%d" % len(content)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, scope: Scope, receive: Receive, *, model: str, version: str | None, verb: Verb) -> bytes:
        record: Record = scope["state"]["record"]
        record.endpoint = verb
        known = self._catalog.find(model)
        record.model = known.name
        loaded = known.version(version)
        record.version = loaded.manifest.version
        limit = self._settings.max_body_bytes
        compressed, length = _announced(scope)
        raw = await _body(receive, length, limit=limit)
        if compressed:
            return await self._in_thread(lambda: ACTS[verb](loaded, inflate(raw, limit=limit), self._settings))
        if verb == "predict" and len(raw) <= INLINE_BYTES:
            return await self._predict(loaded, raw, receive)
        return await self._in_thread(lambda: ACTS[verb](loaded, raw, self._settings))

    async def _in_thread(self, act: Callable[[], T]) -> T:
        return await to_thread.run_sync(act, limiter=self._turns)

    async def _predict(self, loaded: Runtime, raw: bytes, receive: Receive) -> bytes:
        request, rows, logits = scorer.read(loaded, raw, self._settings)
        if rows > loaded.batcher.rows:
            scored = await self._in_thread(lambda: loaded.score_together([request]))
        else:
            waiting = loaded.batcher.submit(request, rows=rows, patience=self._settings.patience)
            scored = await (waiting if loaded.batcher.inline else _unless_gone(waiting, receive))
        return scorer.answer(loaded, scored, logits=logits)


async def _unless_gone(waiting: asyncio.Future[T], receive: Receive) -> T:
    """The result, unless the client leaves first: then the rows need not be scored. Raises ClientDisconnect."""
    leaving = asyncio.ensure_future(_until_gone(receive))
    leaving.add_done_callback(lambda _: waiting.cancel())
    try:
        return await waiting
    except asyncio.CancelledError:
        if leaving.done() and not leaving.cancelled():
            raise ClientDisconnect from None
        raise
    finally:
        leaving.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _announced(scope: Scope) -> tuple[bool, int]:
    """Whether the body is said to be gzip, and how long it is said to be. Raises BodyEncoded for other encodings."""
    compressed, length = False, 0
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            length = int(value[:20])
        elif name == b"content-encoding" and value.lower() != b"identity":
            if value.lower() not in (b"gzip", b"x-gzip"):
                raise BodyEncoded("send the body as it is, or with Content-Encoding: gzip")
            compressed = True
    return compressed, length


async def _body(receive: Receive, length: int, *, limit: int) -> bytes:
    """The body, of any Content-Type. Raises BodyTooLarge as soon as it is known to be."""
    chunks: list[bytes] = []
    free, more = limit, length <= limit
    while more and free >= 0:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        free, more = free - len(chunks[-1]), message.get("more_body", False)
    if length > limit or free < 0:
        raise BodyTooLarge(f"a body may have {limit} bytes")
    return b"".join(chunks)


def inflate(raw: bytes, *, limit: int) -> bytes:
    """A gzip body as it was; stops at `limit` bytes, however many more it would make.

    Raises BodyTooLarge there, and BodyUnreadable where the body is not one whole gzip member.
    """
    inflater = zlib.decompressobj(GZIP)
    try:
        inflated = inflater.decompress(raw, limit + 1)
    except zlib.error:
        raise BodyUnreadable("the body is not gzip") from None
    if len(inflated) > limit:
        raise BodyTooLarge(f"a body may have {limit} bytes, inflated, too")
    if not inflater.eof or inflater.unused_data:
        raise BodyUnreadable("the body is not one whole gzip member")
    return inflated
