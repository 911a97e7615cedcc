"""What web pages of other origins may read: nothing, unless a setting names the origin."""

from collections.abc import Callable
from pathlib import Path

import pytest
from httpx import Client

PREDICT = "/v1/models/tiny-fm:predict"
ORIGIN, OTHER = "https://shop.example", "https://shop.example.org"
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


def allowed(client: Client, method: str, path: str, origin: str, **headers: str) -> tuple[int, str | None]:
    sent = {"origin": origin, **headers}
    body = {"instances": [{}]} if method == "POST" else None
    response = client.request(method, path, headers=sent, json=body)
    assert "access-control-allow-credentials" not in response.headers
    assert response.headers["x-request-id"]
    return response.status_code, response.headers.get("access-control-allow-origin")


def test_it_is_closed_by_default(client: Client) -> None:
    for origin in (ORIGIN, "null", "http://localhost"):
        assert allowed(client, "POST", PREDICT, origin) == (200, None)
        assert allowed(client, "GET", "/v1/models", origin) == (200, None)
        assert allowed(client, "OPTIONS", PREDICT, origin, **ASKS) == (405, None)


@pytest.mark.parametrize("keys", [None, f"shop {'0' * 64} predict"])
def test_a_named_origin_may_read(
    keys: str | None, publish: Callable[[int], Path], serve: Callable[..., Client]
) -> None:
    publish(1)
    client = serve(cors_origins=(ORIGIN, "http://localhost:3000"), api_keys=keys)
    status = 401 if keys else 200
    for path, method in ((PREDICT, "POST"), ("/v1/models", "GET")):
        assert allowed(client, method, path, ORIGIN) == (status, ORIGIN)
        assert allowed(client, method, path, OTHER) == (status, None)
        assert allowed(client, method, path, "http://localhost") == (status, None)
        assert allowed(client, "OPTIONS", path, ORIGIN, **ASKS) == (200, ORIGIN)  # a browser sends no key with it
        assert allowed(client, "OPTIONS", path, OTHER, **ASKS) == (400, None)
    asks = ASKS | {"access-control-request-method": "DELETE"}
    assert allowed(client, "OPTIONS", "/v1/models/tiny-fm/candidate-sets/a", ORIGIN, **asks)[0] == 400
    refused = client.post("/v1/models/nobody:predict", headers={"origin": ORIGIN}, json={})
    assert refused.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
