"""Everything that can be wrong with an artefact or with an input, as one tree. No HTTP in here.

BundleError
├── SchemaError        a field specification that contradicts itself
├── InputError         a value, row or column the encoder refuses
├── BundleInvalid      a bundle on disk that is not whole, or not what its manifest says
│   └── BundleUntrusted    one that no trusted key has signed
└── RuntimeRefused     onnxruntime, or the device asked for, cannot run here
"""

from pathlib import Path


class BundleError(Exception):
    """Base of every error `bundle` raises on purpose; its text is a sentence for a person."""


class SchemaError(BundleError):
    """A feature schema that cannot be right, whatever the data."""


class RuntimeRefused(BundleError):
    """onnxruntime is missing, installed twice, or cannot use the device that was asked for."""


class BundleInvalid(BundleError):
    """A bundle that fails verification; `reason` says what was expected and what was found."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"bundle {str(path)!r}: {reason}")
        self.path = path
        self.reason = reason


class BundleUntrusted(BundleInvalid):
    """A bundle that no trusted key has signed: what is wrong may be the keys."""


class InputError(BundleError):
    """A value the encoder refuses.

    `str(error)` never contains the value itself, so it may be sent over HTTP. The command line adds
    `error.quoted`. `instance` is the position of the row, `field` the name of a field of the schema (None
    where the name itself is unknown), `expected` and `received` describe types.
    """

    def __init__(
        self,
        *,
        expected: str,
        received: str,
        field: str | None = None,
        instance: int | None = None,
        value: object = None,
    ) -> None:
        self.field, self.instance, self.expected, self.received, self.value = (
            field,
            instance,
            expected,
            received,
            value,
        )
        where = [f"field {field!r}"] if field is not None else []
        where += [f"row {instance}"] if instance is not None else []
        super().__init__(f"{', '.join(where) or 'input'}: expected {expected}, received {received}")

    def at(self, *, instance: int, field: str | None = None) -> "InputError":
        """The same error, placed at row `instance` (and `field`)."""
        return InputError(
            expected=self.expected,
            received=self.received,
            field=field or self.field,
            instance=instance,
            value=self.value,
        )

    @property
    def quoted(self) -> str:
        """The refused value as the command line shows it: repr, at most 80 characters."""
        try:
            text = repr(self.value)
        except ValueError:  # an integer of thousands of digits has no repr
            return self.received
        return text if len(text) <= 80 else text[:77] + "..."


def type_name(value: object) -> str:
    """What a JSON reader calls the type of `value`."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case dict():
            return "an object"
        case list() | tuple():
            return "an array"
        case _:
            return type(value).__name__
