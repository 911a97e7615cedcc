"""The hot path: POST :predict, :rank, :explain and infer in raw ASGI, before FastAPI sees them.

A prediction of few rows, as JSON or as tensors, is read on the event loop and scored by its version's batcher together
with others. Whatever takes longer (a long or compressed body, many rows, a ranking, an explanation) has a worker thread
to itself, so that /livez stays quick.
"""

import asyncio
import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from bundle import InputError
from service import body, errors, infer, scorer
from service.batcher import Scored
from service.body import Announced
from service.candidates import CandidateSets
from service.catalog import Catalog
from service.errors import BodyUnsupported, Overdue, ServiceError
from service.explainer import explain
from service.messages import Reply
from service.ranker import rank
from service.recorder import Record
from service.runtime import Request, Runtime, Verb, count_of
from service.settings import Settings

T = TypeVar("T")

ADDRESS: Final = re.compile(
    r"/v1/models/(?P<model>[^/]+?)(?:/versions/(?P<version>[^/]+))?:(?P<verb>predict|explain|rank)"
)
INFER: Final = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/(?P<verb>infer)")
INLINE_BYTES: Final = 65_536  # a body up to this long is read on the event loop, in half a millisecond at most
Act = Callable[[Runtime, bytes, Settings], bytes]


class Form(NamedTuple):
    """A way to ask for scores: a body to rows and what is asked of them, and their scores to the answer."""

    read: Callable[[Runtime, bytes, Settings], tuple[Request, Any]]
    answer: Callable[[Runtime, Scored, Any], Reply]


def is_verb(scope: Scope) -> bool:
    """Whether a request is for the Front, which then finds model, version and verb in `scope["path_params"]`."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    found = ADDRESS.fullmatch(scope["path"]) or INFER.fullmatch(scope["path"])
    if found:
        scope["path_params"] = found.groupdict()
    return found is not None


class Front:
    """Answers the verbs: an ASGI app that stands in a Recorder."""

    def __init__(self, catalog: Catalog, sets: CandidateSets, settings: Settings) -> None:
        self._catalog, self._settings = catalog, settings
        self._acts: dict[Verb, Act] = {"explain": explain, "rank": partial(rank, sets=sets)}
        threads = os.cpu_count() or 1  # more of them would only take turns
        self._turns, self._threads = asyncio.Semaphore(threads), CapacityLimiter(threads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content, headers = await self._answer(scope, receive, **scope["path_params"])
        except (ServiceError, InputError) as error:
            await errors.refused(error)(scope, receive, send)
            return
        length = (b"content-length", b"%d" % len(content))
        await send({"type": "http.response.start", "status": 200, "headers": [length, *headers]})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, scope: Scope, receive: Receive, *, model: str, version: str | None, verb: Verb) -> Reply:
        record: Record = scope["state"]["record"]
        record.endpoint = verb
        known = self._catalog.find(model)
        record.model = known.name
        loaded = known.version(version)
        record.version, record.digest = loaded.manifest.version, loaded.digest
        announced = body.announced(scope)
        if announced.arrow and verb != "predict":
            raise BodyUnsupported("only predict takes an Arrow stream: send JSON")
        raw = await body.received(receive, announced.length, limit=self._settings.max_body_bytes)
        record.received = time.perf_counter()
        if verb in self._acts or announced.arrow:
            return await self._in_thread(lambda: self._act(loaded, raw, verb, announced, record))
        return await self._score(loaded, raw, announced, _form(verb, announced), receive, record)

    def _act(self, loaded: Runtime, raw: bytes, verb: Verb, announced: Announced, record: Record) -> Reply:
        began = time.perf_counter()
        body = self._inflated(raw, announced)
        if verb in self._acts:
            reply = Reply(self._acts[verb](loaded, body, self._settings))
        else:
            reply = _predict_arrow(loaded, body, self._settings, as_arrow=announced.accepts_arrow)
        record.spent(began, read=0.0, queue=0.0, compute=time.perf_counter() - began)
        return reply

    async def _in_thread(self, act: Callable[[], T]) -> T:
        """Raises Overdue where no thread is free within the setting `patience`."""
        try:
            async with asyncio.timeout(self._settings.patience):
                await self._turns.acquire()
        except TimeoutError:
            raise Overdue("the request waited too long for its turn") from None
        try:
            return await to_thread.run_sync(act, limiter=self._threads)
        finally:
            self._turns.release()

    def _inflated(self, raw: bytes, announced: Announced) -> bytes:
        limit = self._settings.max_body_bytes
        return body.inflate(raw, announced.coding, limit=limit) if announced.coding else raw

    async def _score(
        self, loaded: Runtime, raw: bytes, announced: Announced, form: Form, receive: Receive, record: Record
    ) -> Reply:
        if announced.coding or len(raw) > INLINE_BYTES:
            return await self._in_thread(
                lambda: self._score_alone(loaded, self._inflated(raw, announced), form, record)
            )
        with loaded.statistics.request(record) as stages:
            request, asked = form.read(loaded, raw, self._settings)
            stages.read()
            if count_of(request) > loaded.batcher.rows:
                scored = await self._in_thread(lambda: loaded.score_all([request]))
            else:
                waiting = loaded.batcher.submit(request, rows=count_of(request), patience=self._settings.patience)
                scored = await (waiting if loaded.batcher.inline else _unless_gone(waiting, receive))
            stages.scored(scored.seconds)
            return form.answer(loaded, scored, asked)

    def _score_alone(self, loaded: Runtime, raw: bytes, form: Form, record: Record) -> Reply:
        """A whole request at once, in runs of its own."""
        with loaded.statistics.request(record) as stages:
            request, asked = form.read(loaded, raw, self._settings)
            stages.read()
            scored = loaded.score_all([request])
            stages.scored(scored.seconds)
            return form.answer(loaded, scored, asked)


PREDICT: Final = Form(scorer.read, scorer.answer)


def _form(verb: Verb, announced: Announced) -> Form:
    if verb == "predict":
        return PREDICT
    return Form(partial(infer.read, header_length=announced.header_length), infer.answer)


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


def _predict_arrow(loaded: Runtime, raw: bytes, settings: Settings, *, as_arrow: bool) -> Reply:
    try:
        from service.arrow import scorer as arrow  # with the first stream: pyarrow is large, and may not be there
    except ImportError:
        sentence = (
            "pyarrow is not installed where the service runs (pip install -e '.[arrow]' in its folder): send JSON"
        )
        raise BodyUnsupported(sentence) from None
    return arrow.predict(loaded, raw, settings, as_arrow=as_arrow)
