"""Names that clients make up cost nothing that stays."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from service.app import Service, create_app
from service.exposition import families
from service.settings import Settings
from tests.faults.conftest import Measured

NAMES = 100_000

pytestmark = pytest.mark.slow


async def ask(app: Service, path: str, name: str) -> None:
    scope = {
        "type": "http",
        "method": "POST" if path.endswith("predict") else "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"x-request-id", name.encode()), (name.encode(), b"a"), (b"content-length", b"2")],
        "client": ("127.0.0.1", 1),
    }

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(_: Any) -> None:
        pass

    await app(scope, receive, send)


def test_series_stay_as_many_whatever_names_are_sent(bundles: Path, measured: Measured) -> None:
    app, draw = create_app(Settings(bundles=bundles, provider="cpu")), random.Random(1)
    paths = ("/v1/models/{}:predict", "/v1/models/tiny-fm/versions/{}:predict", "/v1/models/{}", "/{}")

    async def all_of_them() -> tuple[int, int]:
        async with app.router.lifespan_context(app):
            for path in paths:
                await ask(app, path.format("warm"), "warm")
            before = count(app)
            for _ in range(NAMES):
                name = f"{draw.getrandbits(64):x}"
                await ask(app, draw.choice(paths).format(name), name)
            return before, count(app)

    before, after = asyncio.run(all_of_them())
    measured("series after 100,000 random names", f"{after} (before {before})", "constant")
    assert after == before


def count(app: Service) -> int:
    (recorder,) = [each for each in app.user_middleware if "metrics" in each.kwargs]
    return sum(len(family.samples) for family in families(recorder.kwargs["metrics"].registry))
