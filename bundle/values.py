"""Raw values and what they stand for: the category of a value, a finite number, a weight."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle.errors import InputError, type_name

CATEGORY = "a string, an integer, a boolean or null"
NUMBER = "a finite number or null"
LARGEST = 1e6  # of a scaled number and of a weight: products of two, and sums of those, stay inside float32


def canonical(value: Any) -> str | None:
    """The category a value stands for, or None where it is missing (null, NaN).

    A string as it is, an integer in decimal, a boolean as `true` or `false`, a float with an integral value as
    that integer. Anything else raises InputError, as do a lone surrogate and an integer too long to print.
    """
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return None
    try:
        match value:
            case str():
                value.encode()
                return str(value)
            case bool() | np.bool_():
                return "true" if value else "false"
            case int() | np.integer():
                return str(int(value))
            case float() | np.floating() if float(value).is_integer():
                return str(int(value))
    except UnicodeEncodeError:
        raise InputError(expected="valid Unicode text", received="a lone surrogate", value=value) from None
    except ValueError:
        raise InputError(expected=CATEGORY, received="an integer of thousands of digits") from None
    received = "a number with a fraction, or infinite" if isinstance(value, float | np.floating) else type_name(value)
    raise InputError(expected=CATEGORY, received=received, value=value)


def numbers(column: Sequence[Any] | NDArray[Any]) -> NDArray[np.float64]:
    """B raw numbers as float64, missing ones as NaN; anything but a finite number raises InputError."""
    if isinstance(column, np.ndarray) and column.dtype == np.float64 and not np.isinf(column).any():
        return column.copy()
    result = np.empty(len(column))
    for at, value in enumerate(column):
        result[at] = np.nan if value is None else _number(value, at)
    return result


def _number(value: Any, at: int, *, expected: str = NUMBER) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        raise InputError(expected=expected, received=type_name(value), instance=at, value=value)
    try:
        number = float(value)
    except OverflowError:
        number = np.inf
    if np.isinf(number):
        raise InputError(expected=expected, received="a number beyond float64", instance=at, value=value)
    return number


def weight(value: Any, at: int) -> float:
    """The weight of one category in a cell of row `at`."""
    expected = f"a weight between -{LARGEST:g} and {LARGEST:g}"
    if value is None:
        raise InputError(expected=expected, received="null", instance=at)
    number = _number(value, at, expected=expected)
    if not abs(number) <= LARGEST:
        raise InputError(expected=expected, received="a number outside", instance=at, value=value)
    return number
