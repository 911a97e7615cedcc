"""The command line of the benchmark."""

import argparse
import asyncio
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from service.bench import load, own, requests, secure
from service.bench.load import Address, Load
from service.bench.report import Report, report
from service.bench.requests import BenchRefused

WARM_SHARE: Final = 0.2  # of the seconds asked for, before anything is counted
WARM_SECONDS: Final = 1.0  # and no longer than this


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m service bench",
        description="Requests a second and latency of a model that is served.",
        epilog="Without --rate a closed loop: every connection asks again as soon as it is answered. With --rate an "
        "open one: requests are due at random moments, and each latency counts from its own. The load generator "
        "itself takes about one core.",
        allow_abbrev=False,
    )
    found.add_argument("--model", required=True, help="the name of the served model")
    found.add_argument(
        "--url",
        help="a service that runs, as http://host:port or https://host:port (default: one of its own is started)",
    )
    trust = found.add_mutually_exclusive_group()
    trust.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="PEM certificates to trust, in the place of the system's, where --url is https",
    )
    trust.add_argument("--insecure", action="store_true", help="trust any certificate there")
    found.add_argument("--key", help="an API key, where the service has keys")
    found.add_argument(
        "--bundles", help="the folder of bundles for a service of its own (default: as python -m service)"
    )
    found.add_argument("--verb", choices=("predict", "rank", "explain"), default="predict", help="(default: predict)")
    found.add_argument(
        "--instances", type=_count, default=1, help="instances, or candidates, in a request (default: 1)"
    )
    found.add_argument("--concurrency", type=_count, default=64, help="connections (default: 64)")
    found.add_argument("--seconds", type=_amount, default=10.0, help="how long to measure (default: 10)")
    found.add_argument("--rate", type=_amount, help="requests a second that are due: an open loop")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON, too")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, print its report; 1 where it cannot be run or nothing was answered with a 200."""
    options = parser().parse_args(arguments)
    try:
        with _service(options) as address:
            found = _run(options, address)
    except (BenchRefused, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(found.as_text(), end="")
    if options.json:
        options.json.write_text(found.as_json())
    return 0 if found.requests else 1


def _run(options: argparse.Namespace, address: Address) -> Report:
    headers = {} if options.key is None else {"authorization": f"Bearer {options.key}"}
    asked = requests.subject(address, options.model, headers)
    body = requests.body(options.verb, asked, options.instances)
    request = load.post(f"/v1/models/{quote(asked.name)}:{options.verb}", body, headers=load.JSON | headers)

    def measured(seconds: float) -> Coroutine[Any, Any, Load]:
        if options.rate is None:
            return load.closed(address, request, connections=options.concurrency, seconds=seconds)
        return load.opened(address, request, connections=options.concurrency, seconds=seconds, rate=options.rate)

    async def run() -> Load:
        await measured(min(WARM_SECONDS, WARM_SHARE * options.seconds))
        return await measured(options.seconds)

    return report(
        _turn(run()),
        model=asked.name,
        version=asked.version,
        verb=options.verb,
        instances=options.instances,
        connections=options.concurrency,
        rate=options.rate,
    )


def _turn(run: Coroutine[Any, Any, Load]) -> Load:
    """On the quickest event loop there is: the load generator should not be what is measured."""
    if sys.platform == "win32":
        return asyncio.run(run)
    import uvloop

    return uvloop.run(run)


@contextmanager
def _service(options: argparse.Namespace) -> Iterator[Address]:
    trust = "--ca" if options.ca else "--insecure" if options.insecure else None
    if options.url is None:
        if trust:
            raise BenchRefused(f"{trust} is for a service at --url https://host:port")
        with own.serving(options.bundles) as address:
            yield address
        return
    if options.bundles is not None:
        raise BenchRefused("--bundles is for a service of its own: leave it or --url out")
    host, port, is_https = _place(options.url)
    if trust and not is_https:
        raise BenchRefused(f"{trust} is for a service at https://…, and --url is another")
    if not is_https:
        yield Address(host, port or 80)
    else:
        yield Address(host, port or 443, secure.anybody() if options.insecure else secure.trusting(options.ca))


def _place(url: str) -> tuple[str, int | None, bool]:
    """Host, port, and whether it is HTTPS. Raises BenchRefused."""
    try:
        found = urlsplit(url)
        if found.scheme in {"http", "https"} and found.hostname:
            return found.hostname, found.port, found.scheme == "https"
    except ValueError:  # a port that is none
        pass
    raise BenchRefused(f"--url {url!r}: expected http://host:port or https://host:port")


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError("expected an integer of at least 1")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("expected a number above 0")
    return value
