"""API keys. Of a key only its sha256 is known here, with the name of whoever has it and what it is good for.

In a file each is a line of its own: name, sha256 in hexadecimal, scopes, and the moment from which it is good for
nothing, where there is one (`shop 9f86…0a08 predict,explain 2027-01-01`; # begins a comment).
"""

import hmac
import logging
import math
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

Right = Literal["predict", "explain", "admin"]
RIGHTS: Final[tuple[Right, ...]] = get_args(Right)
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
LINE: Final = "a name, the sha256 of the key, its scopes and, where it ends, a date (python -m service keygen)"
MOST_BYTES: Final = 2**20
LOOK_SECONDS: Final = 1.0  # between looks at whether the file has changed
INDEXED: Final = 8  # bytes of a digest by which it is found; all of it is compared afterwards

log = logging.getLogger(__name__)


class KeysRefused(Exception):
    """Keys that make no sense; the text names the line and none of its content."""


class Key(NamedTuple):
    """`until` is a time as `time.time()` has it."""

    name: str
    digest: bytes
    rights: frozenset[Right]
    until: float = math.inf

    @property
    def line(self) -> str:
        """The key as a line of a file."""
        ends = [] if math.isinf(self.until) else [datetime.fromtimestamp(self.until, UTC).isoformat()]
        rights = ",".join(right for right in RIGHTS if right in self.rights)
        return " ".join([self.name, self.digest.hex(), rights, *ends])


NOBODY: Final = Key("", bytes(32), frozenset())


class Keys:
    """The keys that are good now, `given` as a file or as its lines; `always` are there besides.

    Empty until `load`. A file that has changed is read again when the next key is looked up, and at `renew`.
    """

    def __init__(self, given: str | None, always: Sequence[Key] = ()) -> None:
        self._given, self._always = given, always
        self._file = Path(given) if given and not _are_lines(given) else None
        self._found: dict[bytes, Key] = {}
        self._seen: tuple[int, ...] = ()
        self._look_at = 0.0

    def load(self) -> None:
        """Raises KeysRefused; then the keys that were there stay."""
        self._seen = _state(self._file)
        own = _read(self._given) if self._given is not None else ()
        self._found = {key.digest[:INDEXED]: key for key in (*self._always, *own)}

    def renew(self) -> None:
        """The same, where nobody waits for an answer: what is wrong is logged."""
        before = set(self._found.values())
        try:
            self.load()
        except KeysRefused as refused:
            log.error("keys not read", extra={"facts": {"reason": str(refused), "kept": len(before)}})
            return
        if before != set(self._found.values()):
            log.info("keys", extra={"facts": {"names": sorted(key.name for key in self._found.values())}})

    def find(self, secret: bytes) -> Key | None:
        """The key that somebody sent, even where it has ended."""
        if self._file is not None and time.monotonic() >= self._look_at:
            self._look()
        digest = sha256(secret).digest()
        found = self._found.get(digest[:INDEXED], NOBODY)
        return found if hmac.compare_digest(found.digest, digest) else None

    def _look(self) -> None:
        self._look_at = time.monotonic() + LOOK_SECONDS
        if _state(self._file) != self._seen:
            self.renew()


def of_secret(name: str, secret: str, rights: Iterable[Right], until: float = math.inf) -> Key:
    return Key(name, sha256(secret.encode()).digest(), frozenset(rights), until)


def new_secret() -> str:
    """256 bits of chance: nobody guesses it, so its sha256 needs neither salt nor rounds."""
    return f"fl_{secrets.token_urlsafe(32)}"


def check(given: str) -> None:
    """Raises KeysRefused for a value of the setting `api_keys` that no service could start with."""
    _read(given)


def parse(text: str, where: str = "api_keys") -> tuple[Key, ...]:
    """The keys in the lines of a text; `;` ends a line, too. Raises KeysRefused, which says `where` they are from."""
    found: dict[bytes, Key] = {}
    for number, line in enumerate(re.split(r"[\n;]", text), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key = _key(words, f"{where}, line {number}")
        if found.setdefault(key.digest[:INDEXED], key) is not key:
            raise KeysRefused(f"{where}, line {number}: the same key is there twice")
    if not found:
        raise KeysRefused(f"{where}: there is none; each is a line of {LINE}")
    return tuple(found.values())


def moment(text: str) -> float:
    """A date, at its beginning, or a time, in UTC unless it says otherwise. Raises ValueError."""
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def rights_of(text: str) -> frozenset[Right]:
    """Of names separated by commas. Raises ValueError."""
    asked = set(text.split(","))
    if not asked <= set(RIGHTS):
        raise ValueError(f"expected some of {', '.join(RIGHTS)}, separated by commas")
    return frozenset(right for right in RIGHTS if right in asked)


def _key(words: list[str], where: str) -> Key:
    if not 3 <= len(words) <= 4:
        raise KeysRefused(f"{where}: expected {LINE}; received {len(words)} words")
    name, digest, rights, *until = words
    if not NAME.fullmatch(name):
        raise KeysRefused(f"{where}: expected a name of up to 64 letters, digits, dots, _ and -")
    if not DIGEST.fullmatch(digest):
        raise KeysRefused(f"{where}: expected a sha256, 64 hexadecimal digits in lower case, never a key")
    try:
        granted = rights_of(rights)
    except ValueError as error:
        raise KeysRefused(f"{where}: scopes: {error}") from None
    try:
        ends = moment(until[0]) if until else math.inf
    except ValueError:
        raise KeysRefused(f"{where}: expected a date such as 2027-01-31 where it ends") from None
    return Key(name, bytes.fromhex(digest), granted, ends)


def _are_lines(given: str) -> bool:
    """A path has no word of 64 hexadecimal digits among others."""
    return len(given.split()) > 1 and any(DIGEST.fullmatch(word) for word in re.split(r"[\s;]+", given))


def _read(given: str) -> tuple[Key, ...]:
    """The keys of a file, or those that were given as lines. Raises KeysRefused.

    Only a file that is there is named: what was given may be a key in its place.
    """
    if _are_lines(given):
        return parse(given)
    where = "api_keys"
    with suppress(OSError, ValueError):
        Path(given).stat()
        where = f"api_keys {given!r}"
    return parse(_text(given, where), where)


def _text(given: str, where: str) -> str:
    try:
        with Path(given).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise KeysRefused(f"{where}: the file has more than {MOST_BYTES:,} bytes")
        return content.decode()
    except OSError as error:
        raise KeysRefused(f"{where}: the file cannot be read: {error.strerror or type(error).__name__}") from None
    except ValueError:
        raise KeysRefused(f"{where}: the file is no text") from None


def _state(file: Path | None) -> tuple[int, ...]:
    """What changes when a file does; empty where there is none."""
    try:
        found = file.stat() if file else None
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else ()
