"""How many letters a value may have."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from pydantic import BaseModel

from bundle import InputError, Numeric
from bundle.schema import FittedField
from service.errors import of_context

LONGEST: Final = 1024  # the setting max_value_length, unless it says another


def check(body: BaseModel, fields: Iterable[FittedField], *, longest: int) -> None:
    """Raise InputError for a text of more than `longest` letters in the rows or columns of a body; in the context of
    a ranking BodyRefused.
    """
    names = [field.name for field in fields if not isinstance(field.kind, Numeric)]
    said = dict(body)
    columns = said.get("columns") or {}
    rows = [*(said.get("instances") or said.get("candidates") or ())]
    for name in names:
        check_column(columns.get(name, ()), name, longest=longest)
        check_column([row.get(name) for row in rows], name, longest=longest)
        try:
            check_column([(said.get("context") or {}).get(name)], name, longest=longest)
        except InputError as error:
            raise of_context(error) from None


def check_column(column: Sequence[Any], field: str, *, longest: int) -> None:
    """Raise InputError for a text of more than `longest` letters in raw values of a field."""
    for at, value in enumerate(column):
        texts = value if isinstance(value, list | dict) else (value,)
        length = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if length > longest:
            raise too_long(length, field, longest=longest, instance=at)


def too_long(length: int, field: str, *, longest: int, instance: int | None) -> InputError:
    return InputError(
        expected=f"at most {longest} letters", received=f"{length} letters", field=field, instance=instance
    )
