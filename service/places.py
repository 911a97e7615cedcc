"""Where a body is wrong in a way that JSON readers either cannot place or do not see: a value that JSON does not have,
text that is no Unicode, a key that is there twice.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from service.errors import BodyRefused, BodyUnreadable, Refusal

PLACED_BYTES: Final = 2**20  # to look for the place in a longer body would take seconds
DIGITS: Final = 4300  # that Python reads
Path = tuple[str | int, ...]


class Place(NamedTuple):
    """A place as a refusal names it: by names of ours alone."""

    key: str | None = None
    instance: int | None = None
    field: str | None = None


Name = Callable[[Path], Place]


class _Wrong(NamedTuple):
    """Stands in the place of what is wrong."""

    expected: str
    received: str


class _Twice(Exception):
    """An object has a key twice."""


NOT_FINITE: Final = _Wrong("a finite number or null", "NaN or Infinity")
LONG: Final = _Wrong("a number", "one of thousands of digits")
NO_TEXT: Final = _Wrong("valid Unicode text", "bytes that are no UTF-8, or a lone surrogate")
TWICE: Final = _Wrong("each key once", "a key twice")


def check_unique(raw: bytes, name: Name) -> None:
    """Raise BodyRefused where an object of a body has a key twice; `name` says how a path is called.

    Raises BodyUnreadable where it is not JSON after all: a reader may not look into what it skips.
    """
    try:
        _SEEN_ONCE.decode(raw.decode())
    except _Twice:
        path, wrong = _first(raw) or ((), TWICE)
        raise BodyRefused(_refusal(name(path), wrong)) from None
    except (ValueError, RecursionError):
        raise unreadable(raw, "Python cannot read it", name) from None


def unreadable(raw: bytes, said: str, name: Name) -> BodyUnreadable:
    """The refusal of a body that is not JSON, with the place where it can be told; else with what a reader `said`."""
    found = _first(raw)
    if found is None:
        return BodyUnreadable(f"the body is not JSON: {said}")
    path, wrong = found
    refused = BodyRefused(_refusal(name(path), wrong))
    error = BodyUnreadable(f"the body is not JSON: {refused}")
    error.refusals = refused.refusals
    return error


def _refusal(place: Place, wrong: _Wrong) -> Refusal:
    return Refusal(
        key=place.key,
        instance=place.instance,
        field=place.field,
        expected=wrong.expected,
        received=wrong.received,
    )


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        raise _Twice


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                made[key] = TWICE
            seen.add(key)
    return made


def _integer(digits: str) -> object:
    return LONG if len(digits) > DIGITS else 0


_SEEN_ONCE: Final = json.JSONDecoder(object_pairs_hook=_once, parse_int=len, parse_float=len, parse_constant=len)
_LENIENT: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=len, parse_constant=lambda _: NOT_FINITE
)


def _first(raw: bytes) -> tuple[Path, _Wrong] | None:
    """The first thing that is wrong, and the way to it; None where Python cannot read it either, or would for long."""
    if len(raw) > PLACED_BYTES:
        return None
    try:
        body = _LENIENT.decode(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return next(iter(_all(body, ())), None)


def _all(node: object, path: Path) -> Iterable[tuple[Path, _Wrong]]:
    match node:
        case _Wrong():
            yield path, node
        case str():
            if not _is_text(node):
                yield path, NO_TEXT
        case dict():
            for key, value in node.items():
                if not _is_text(key):
                    yield path, NO_TEXT
                yield from _all(value, (*path, key))
        case list():
            for at, value in enumerate(node):
                yield from _all(value, (*path, at))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
