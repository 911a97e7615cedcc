"""What a benchmark asks: requests made of the example that the service itself gives of a model, never of a log."""

import http.client
import json
import random
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from service.bench.load import SEED, Address

KEPT: Final = 0.9  # share of the fields that an instance has; the others are missing
TIMEOUT_SECONDS: Final = 10.0


class BenchRefused(Exception):
    """A benchmark that cannot be run; the text is for the person who asked for it."""


class Subject(NamedTuple):
    """A model as the service describes it: `fields` with name, kind and source, and one whole instance."""

    name: str
    version: int
    fields: Sequence[dict[str, Any]]
    example: dict[str, Any]


def subject(address: Address, model: str, headers: Mapping[str, str]) -> Subject:
    """Ask the service for a model. Raises BenchRefused where nothing answers, or no version of it serves."""
    connection = _connection(address)
    try:
        connection.request("GET", f"/v1/models/{quote(model, safe='')}", headers=dict(headers))
        answer = connection.getresponse()
        said = json.loads(answer.read())
    except ssl.SSLCertVerificationError as error:
        hint = "--ca names a file of certificates to trust, --insecure trusts anybody"
        raise BenchRefused(
            f"the certificate of {address.url} is not trusted ({error.verify_message}): {hint}"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BenchRefused(f"no service answers at {address.url} ({error})") from None
    finally:
        connection.close()
    if answer.status == 401:
        raise BenchRefused(f"model {model!r}: {said.get('detail', answer.reason)} (--key gives one)")
    if answer.status != 200:
        raise BenchRefused(f"model {model!r}: {said.get('detail', answer.reason)}")
    if not said["ready"]:
        raise BenchRefused(f"no version of {model} can serve: {json.dumps(said['rejected'])}")
    return Subject(said["name"], said["version"], said["fields"], said["example"])


def _connection(address: Address) -> http.client.HTTPConnection:
    host, port, tls = address
    if tls is None:
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=tls)


def body(verb: str, asked: Subject, count: int) -> bytes:
    """The body of a request of `count` instances or candidates; the same one every time."""
    draw = random.Random(SEED)
    if verb != "rank":
        return json.dumps({"instances": [_varied(asked.example, draw) for _ in range(count)]}).encode()
    of_items = [field["name"] for field in asked.fields if field["source"] == "item"]
    of_candidates = of_items if 0 < len(of_items) < len(asked.fields) else [asked.fields[-1]["name"]]
    item = {name: value for name, value in asked.example.items() if name in of_candidates}
    context = {name: value for name, value in asked.example.items() if name not in of_candidates}
    return json.dumps({"context": context, "candidates": [_varied(item, draw) for _ in range(count)]}).encode()


def _varied(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The row with some fields left out, its numbers scaled and its lists cut."""
    return {name: _other(value, draw) for name, value in row.items() if draw.random() < KEPT}


def _other(value: Any, draw: random.Random) -> Any:
    match value:
        case float():
            return value * draw.uniform(0.5, 1.5)
        case list() if value:
            return value[: draw.randint(1, len(value))]
        case _:
            return value
