"""Who is turned away on the short way: what they are told, and when."""

import asyncio
import re
import time
from pathlib import Path

import pytest

from service import express
from service.admission import HOLD_SECONDS
from tests.service.test_admission import crowded
from tests.service.test_express import ASKED, OIP, Talk, service, talking
from tests.service.test_heads import posted

EXPLAINED = posted("/v1/models/tiny-fm:explain", b"anything")
RANKED = posted("/v1/models/tiny-fm:rank", b"anything")


@pytest.mark.parametrize("request_", [ASKED, EXPLAINED, RANKED, posted("/v2/models/tiny-fm/infer", OIP)])
def test_who_is_turned_away_is_told_so_the_short_way(bundles: Path, request_: bytes) -> None:
    async def talk(to: Talk) -> None:
        with crowded(to.app):
            status, headers, answer = await to.say(request_)
            assert (status, to.taken) == (503, [True])
            connection = to.connect()
            connection.protocol._express = None
            other = await to.answer(await to.begin(request_, connection))
        assert (other[0], other[2]) == (503, answer)
        drawn = {"x-request-id": "", "retry-after": ""}
        assert {**headers, **drawn} == {**other[1], **drawn}
        assert 1 <= int(headers["retry-after"]) <= 11
        verb = re.split("[:/]", request_.split()[1].decode())[-1]
        assert await to.metric(f'factorlens_requests_total{{endpoint="{verb}",model="tiny-fm",status="503"}}') == 2
        assert await to.metric('factorlens_refused_total{model="tiny-fm",reason="overload"}') == 2

    talking(service(bundles), talk)


def test_who_is_turned_away_is_told_so_a_little_later_with_others(
    bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(express, "AT_ONCE", 2)

    async def talk(to: Talk) -> None:
        await to.learn(EXPLAINED)
        connections = [to.connect() for _ in range(6)]
        broken, left, lame, *others = connections

        def fail(_: bytes) -> None:
            raise RuntimeError

        broken.transport.write = fail  # type: ignore[method-assign]
        began = time.perf_counter()
        with crowded(to.app):
            for connection in connections:
                connection.protocol.data_received(EXPLAINED)
        left.protocol.connection_lost(None)
        lame.protocol.shutdown()
        others[0].protocol.data_received(b"GET /v1/nothing HTTP/1.1\r\nhost: h\r\n\r\n")
        assert not any(connection.said for connection in others)
        answers = [await to.answer(connection) for connection in (lame, *others[1:])]
        assert time.perf_counter() - began >= HOLD_SECONDS
        assert [status for status, *_ in answers] == [503] * 3
        assert [headers.get("connection") for _, headers, _ in answers] == ["close", None, None]
        assert len({headers["x-request-id"] for _, headers, _ in answers}) == 3
        async with asyncio.timeout(20):
            while len(others[0].said) < 2:
                await asyncio.sleep(0.001)
        assert [said.split()[1] for said in others[0].said] == [b"503", b"404"]
        assert left.said == [b""]
        with crowded(to.app):
            assert (await to.say(EXPLAINED))[0] == 503  # a timer runs again
        assert to.taken == [True] * 7
        assert await to.metric('factorlens_requests_total{endpoint="explain",model="tiny-fm",status="503"}') == 7

    talking(service(bundles), talk)
