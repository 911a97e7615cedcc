"""What stands before FastAPI: requests side by side, requests that wait too long, clients that leave."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from httpx import ASGITransport, AsyncClient, Client
from starlette.requests import ClientDisconnect

from service import batcher
from service.app import Service, create_app
from service.errors import Problem
from service.settings import Settings
from service.turns import unless_gone


def test_requests_side_by_side_share_runs_and_get_their_own_answers(bundles: Path) -> None:
    app = create_app(Settings(bundles=bundles, provider="cpu"))
    rows = [{"user": f"u{user}", "app": "a1", "age": user} for user in range(20)]
    bodies = [{"instances": [row], "logits": True} for row in rows]
    bodies[3], bodies[7] = {"instances": [{"age": "old"}]}, {"instances": []}

    async def ask(app: Service) -> tuple[list[Any], list[Any], str]:
        async with app.router.lifespan_context(app):
            client = AsyncClient(transport=ASGITransport(app), base_url="http://service")
            path = "/v1/models/tiny-nfm:predict"
            together = await asyncio.gather(*(client.post(path, json=body) for body in bodies))
            runs = (await client.get("/metrics")).text
            alone = [await client.post(path, json=body) for body in bodies]
            return together, alone, runs

    together, alone, runs = asyncio.run(ask(app))
    assert [each.status_code for each in together] == [422 if at in (3, 7) else 200 for at in range(20)]
    for one, other in zip(together, alone, strict=True):
        if one.status_code == 200:
            assert one.json()["logits"] == pytest.approx(other.json()["logits"], abs=1e-6)
        else:
            assert one.json() == other.json()
    found = [
        line
        for line in runs.splitlines()
        if line.startswith('factorlens_run_rows_count{graph="score",model="tiny-nfm"}')
    ]
    assert float(found[0].split()[-1]) < 18


def test_a_request_that_waits_too_long_is_a_503(serve: Callable[..., Client], publish: Callable[[int], Path]) -> None:
    publish(1)
    response = serve(deadline=1e-9).post("/v1/models/tiny-fm:predict", json={"instances": [{}]})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert Problem.model_validate_json(response.content).type == "urn:factorlens:problem:overdue"


def test_predictions_are_the_same_where_runs_are_long(
    serve: Callable[..., Client], publish: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(1)
    client, body = serve(), {"instances": [{"user": "u1"}, {}]}
    inline = client.post("/v1/models/tiny-fm:predict", json=body).json()
    monkeypatch.setattr(batcher, "SHORT_SECONDS", -1.0)
    assert client.post("/v1/models/tiny-fm:predict", json=body).json() == inline


def test_a_client_that_leaves_takes_its_rows_along() -> None:
    async def leave() -> bool:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        with pytest.raises(ClientDisconnect):
            await unless_gone(waiting, receive)
        return waiting.cancelled()

    assert asyncio.run(leave())
