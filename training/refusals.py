"""What pydantic refuses in a file that a person wrote, as one sentence."""

import difflib
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

UNIONS = (Union, UnionType)


def refusal(error: ValidationError, root: type[BaseModel], *tables: str) -> str:
    """Which key of a `root` is wrong, what is accepted and what was given; `tables` are those that it is nested in."""
    # A misspelt key is also a missing one: the spelling is the better news.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    misspelt = first["type"] == "extra_forbidden"
    shown, table = _place(root, first["loc"][:-1] if misspelt else first["loc"])
    where = ".".join([*tables, *shown]) or "top level"
    if misspelt:
        return unknown(where, str(first["loc"][-1]), list(table.model_fields))
    return f"{where}: {message(first)}"


def message(error: Any) -> str:
    """What one of pydantic's errors says, without the place."""
    if error["type"] == "string_pattern_mismatch":
        return (
            f"expected a-z, 0-9, - and _, at most 64 of them, the first a letter or digit, got {error['input']!r:.80}"
        )
    text = str(error["msg"]).removeprefix("Value error, ")
    given = "" if error["type"] in ("missing", "value_error") else f", got {error['input']!r:.80}"
    return text[0].lower() + text[1:] + given


def unknown(where: str, given: str, known: Sequence[str]) -> str:
    """A name that is not known in this place, and the nearest that is."""
    nearest = difflib.get_close_matches(given, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{where}: unknown {given!r:.80}{hint} (known: {', '.join(known)})"


def _place(root: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], Any]:
    """A pydantic location as the file spells it, and the type that stands there; what chose in a union is left out."""
    shown: list[str] = []
    found: Any = root
    for part in location:
        if part == "[key]":  # the name itself, and not what stands under it
            continue
        if get_origin(found) in UNIONS:
            found = next((each for each in get_args(found) if _is_table(each) and _kind(each) == part), None)
            continue
        shown.append(str(part))
        if _is_table(found):
            found = _bare(found.model_fields[part].annotation) if part in found.model_fields else None
        else:  # one of several: the entry of a list, or what stands under a name
            found = next((_bare(each) for each in reversed(get_args(found)) if each is not ...), None)
    return shown, found


def _bare(annotation: Any) -> Any:
    """Without None, and without what pydantic is told beside the type."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    options = [each for each in get_args(annotation) if each is not NoneType]
    return _bare(options[0]) if get_origin(annotation) in UNIONS and len(options) == 1 else annotation


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kind(table: type[BaseModel]) -> object:
    return table.model_fields["kind"].default if "kind" in table.model_fields else None
