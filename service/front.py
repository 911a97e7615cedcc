"""The hot path: POST :predict, :rank, :explain and infer in raw ASGI, before FastAPI sees them.

A prediction of few rows, as JSON or as tensors, is read on the event loop and scored by its version's batcher together
with others; rankings of few values are read and made there, too. Whatever takes longer (a long or compressed body, many
rows or candidates, an explanation) has a worker thread to itself, so that /livez stays quick.
"""

import re
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final

from starlette.types import Receive, Scope, Send

from bundle import InputError
from service import body, errors, infer, ranker, scorer
from service.admission import Gate, turn_away
from service.batcher import Waiting
from service.body import Announced
from service.candidates import CandidateSets
from service.catalog import Catalog
from service.errors import BodyUnsupported, Overdue, Overloaded, ServiceError
from service.explainer import explain
from service.messages import Reply
from service.metrics import Metrics
from service.rankings import Rankings
from service.runtime import Runtime, Verb, count_of
from service.scoring import INLINE_BYTES, Answer, Form, Order, Scoring
from service.settings import Settings
from service.shadow import Shadow
from service.statistics import Spans, Stages
from service.traffic import request_key
from service.turns import Turns, unless_gone

ADDRESS: Final = re.compile(
    r"/v1/models/(?P<model>[^/]+?)(?:/versions/(?P<version>[^/]+))?:(?P<verb>predict|explain|rank)"
)
INFER: Final = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/(?P<verb>infer)")
LONG_WAIT: Final = 0.1  # seconds: whoever waits so long may leave before
Act = Callable[[Runtime, bytes, Settings], Reply]


def is_verb(scope: Scope) -> bool:
    """Whether a request is for the Front, which then finds model, version and verb in `scope["path_params"]`."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    found = _address(scope["path"])
    if found:
        scope["path_params"] = found
    return found is not None


@lru_cache(maxsize=256)
def _address(path: str) -> dict[str, Any] | None:
    found = ADDRESS.fullmatch(path) or INFER.fullmatch(path)
    return found.groupdict() if found else None


class Front:
    """Answers the verbs: an ASGI app that stands in a Recorder."""

    def __init__(
        self, catalog: Catalog, sets: CandidateSets, settings: Settings, metrics: Metrics, shadow: Shadow
    ) -> None:
        self._catalog, self._settings, self._shadow = catalog, settings, shadow
        self._acts: dict[Verb, Act] = {"explain": explain, "rank": partial(ranker.rank, sets=sets)}
        self._turns = Turns()
        self._gate = Gate(settings, metrics, threads=self._turns.threads)
        self._rankings = Rankings(sets, settings, self._gate, self._turns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if failure := scope["state"]["record"].failure:
                raise failure
            content, headers, _ = await self._answer(scope, receive)
        except Overloaded as error:
            pause = error.pause
        except (ServiceError, InputError) as error:
            if isinstance(error, Overdue):
                self._gate.overdue(scope["state"]["record"].model)
            await errors.refused(error)(scope, receive, send)
            return
        else:
            length = (b"content-length", b"%d" % len(content))
            await send({"type": "http.response.start", "status": 200, "headers": [length, *headers]})
            await send({"type": "http.response.body", "body": content})
            return
        await turn_away(pause, scope, send)  # not where the error still leads to the body: this takes a while

    def order(self, scope: Scope) -> Order:
        """What the head of a request asks for. Raises ServiceError where nobody here could answer."""
        asked, record = scope["path_params"], scope["state"]["record"]
        verb, version = asked["verb"], asked["version"]
        record.endpoint = verb
        known = self._catalog.find(asked["model"])
        record.model = known.name
        traffic = known.traffic
        loaded = known.version(version, request_key(scope) if traffic.canary_below and version is None else None)
        record.version, record.digest = loaded.manifest.version, loaded.digest
        announced = body.announced(scope)
        if announced.arrow and verb != "predict":
            raise BodyUnsupported("only predict takes an Arrow stream: send JSON")
        is_act = verb in self._acts or announced.arrow
        may_have_shadow = traffic.shadow_below and self._shadow.has_room and version is None and not is_act
        shadow = traffic.shadow_of(loaded, scope) if may_have_shadow else None
        due = record.started + (announced.timeout or self._settings.deadline)
        is_long = is_act or announced.coding > 0 or announced.length > INLINE_BYTES
        return Order(record, loaded, verb, announced, _form(verb, announced), shadow, due, is_long)

    def refused(self, order: Order) -> Overloaded | None:
        """What a request is told that, as announced, is not let in; it is counted."""
        return self._gate.refused(order.loaded, order.verb, order.announced, is_long=self._seems_long(order))

    def _seems_long(self, order: Order) -> bool:
        """Whether a request, as announced, will have a thread to itself."""
        return order.is_long and not self._rankings.seems_short(order)

    def takes_at_once(self, order: Order, raw: bytes) -> bool:
        """Whether a request whose body is here would be scored in the next run, as far as can be told without reading
        it: neither have bodies of its length too many rows on the average, nor has it too many braces."""
        loaded = order.loaded
        return (
            not order.is_long
            and self._is_soon(loaded)
            and len(raw) <= self._settings.max_body_bytes
            and max(loaded.short_pace[order.verb].rows(len(raw)), raw.count(b"{") - 1) <= loaded.batcher.rows
            and self._gate.refusal(loaded, order.verb, order.announced, is_long=False) is None
        )

    def read(self, order: Order, raw: bytes, stages: Stages) -> Scoring:
        """The body of a request that is to be scored together with others."""
        loaded = order.loaded
        order.record.spans = stages.spans
        request, asked = order.form.read(loaded, raw, self._settings)
        stages.read()
        rows = count_of(request)
        return Scoring(loaded, request, asked, rows, len(raw), stages)

    def put(self, order: Order, scoring: Scoring, raw: bytes, waiting: Waiting) -> None:
        """Take a place on the event loop; the next run tells `waiting`."""
        loaded = order.loaded
        scoring.enter(self._gate.loop, loaded.short_pace[order.verb], self._answer_of(order, raw))
        loaded.batcher.put(scoring.request, rows=scoring.rows, due=order.due, waiting=waiting)

    def _is_soon(self, loaded: Runtime) -> bool:
        return loaded.batcher.inline and self._gate.loop.seconds < LONG_WAIT

    def _answer_of(self, order: Order, raw: bytes) -> Answer:
        form, shadow = order.form, order.shadow
        return form.answer if shadow is None else self._shadow.after(form, shadow, raw, order.announced)

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        order = self.order(scope)
        is_long = self._seems_long(order)
        self._gate.admit(order.loaded, order.verb, order.announced, is_long=is_long)
        raw = await body.received(receive, order.announced.length, limit=self._settings.max_body_bytes)
        if not order.is_long and len(raw) <= INLINE_BYTES:
            return await self._score(order, raw, receive)
        act: Callable[[], Reply] = partial(self._act, order, self._answer_of(order, raw), raw)
        is_read = self._rankings.is_soon_read(order, raw)
        if is_read:
            ranked = await self._rankings.answer(order, raw, receive)
            if isinstance(ranked, Reply):
                return ranked
            act = ranked
        reply = await self._long(order, len(raw), act, receive, is_admitted=is_long and len(raw) <= INLINE_BYTES)
        if not is_read:
            self._rankings.learn(order, raw, reply.rows)
        return reply

    async def _long(
        self, order: Order, length: int, act: Callable[[], Reply], receive: Receive, *, is_admitted: bool
    ) -> Reply:
        """The answer to a request that has a thread to itself. Others may have come before one that only now turns out
        to be long: that is not admitted yet."""
        record, loaded, verb = order.record, order.loaded, order.verb
        if not is_admitted:
            self._gate.admit(loaded, verb, order.announced._replace(length=length), is_long=True)
        lane, pace, entered_at = self._gate.threads, loaded.long_pace[verb], time.perf_counter()
        record.received = entered_at
        rows = pace.rows(length)
        seconds = lane.enter(pace, length, rows)
        try:
            reply = await self._turns.run(
                act,
                due=order.due,
                receive=receive,
                dropped=partial(self._gate.dropped, loaded.manifest.name, rows=rows),
            )
        finally:
            lane.leave(pace, length, rows, seconds, entered_at)
        pace.learn_rows(length, reply.rows)
        return reply

    def _act(self, order: Order, answer: Answer, raw: bytes) -> Reply:
        """The answer to a request that has a thread to itself."""
        record, loaded, verb, announced = order.record, order.loaded, order.verb, order.announced
        began = time.perf_counter()
        if announced.coding:
            raw = body.inflate(raw, announced.coding, limit=self._settings.max_body_bytes)
        if verb in self._acts or announced.arrow:
            if verb in self._acts:
                reply = self._acts[verb](loaded, raw, self._settings)
            else:
                reply = _predict_arrow(loaded, raw, self._settings, as_arrow=announced.accepts_arrow)
            spans = Spans(began, 0.0, 0.0, time.perf_counter() - began)
            record.spans = lambda: spans
            return reply
        with loaded.statistics.request() as stages:
            record.spans = stages.spans
            request, asked = order.form.read(loaded, raw, self._settings)
            stages.read()
            scored = loaded.score_all([request])
            stages.scored(scored.seconds)
            return answer(loaded, scored, asked)

    async def _score(self, order: Order, raw: bytes, receive: Receive) -> Reply:
        """The answer to a request that is scored together with others."""
        loaded, verb = order.loaded, order.verb
        with loaded.statistics.request() as stages:
            scoring = self.read(order, raw, stages)
            loaded.short_pace[verb].learn_rows(len(raw), scoring.rows)
            is_many = scoring.rows > loaded.batcher.rows
            if is_many:
                self._gate.admit(loaded, verb, order.announced._replace(length=len(raw)), is_long=True)
                scoring.enter(self._gate.threads, loaded.long_pace[verb], self._answer_of(order, raw))
            else:
                scoring.enter(self._gate.loop, loaded.short_pace[verb], self._answer_of(order, raw))
                waiting = loaded.batcher.submit(scoring.request, rows=scoring.rows, due=order.due)
            try:
                if is_many:
                    scored = await self._turns.run(
                        lambda: loaded.score_all([scoring.request]),
                        due=order.due,
                        receive=receive,
                        dropped=partial(self._gate.dropped, loaded.manifest.name, rows=scoring.rows),
                    )
                else:
                    scored = await (waiting if self._is_soon(loaded) else unless_gone(waiting, receive))
                return scoring.answer(scored)
            finally:
                scoring.leave()


PREDICT: Final = Form(scorer.read, scorer.answer)


def _form(verb: Verb, announced: Announced) -> Form:
    if verb == "predict":
        return PREDICT
    return Form(partial(infer.read, header_length=announced.header_length), infer.answer)


def _predict_arrow(loaded: Runtime, raw: bytes, settings: Settings, *, as_arrow: bool) -> Reply:
    try:
        from service.arrow import scorer as arrow  # with the first stream: pyarrow is large, and may not be there
    except ImportError:
        sentence = (
            "pyarrow is not installed where the service runs (pip install -e '.[arrow]' in its folder): send JSON"
        )
        raise BodyUnsupported(sentence) from None
    return arrow.predict(loaded, raw, settings, as_arrow=as_arrow)
