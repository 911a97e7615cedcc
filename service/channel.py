"""How a supervisor and its workers talk: messages over a pair of sockets."""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import msgspec
from msgspec import Struct

from service.control import ChangeModel, Command, Inventory, Prepare, Report
from service.exposition import Family

LENGTH: Final = struct.Struct("!I")


class Begin(Struct, frozen=True, tag=True):
    """To a new worker: the settings as JSON, where to listen, and what to load."""

    number: int
    settings: bytes
    family: int
    address: list[Any]
    inventory: Inventory


class Listen(Struct, frozen=True, tag=True):
    """To a worker that has loaded, and knows whatever the others know: answer requests."""


class Do(Struct, frozen=True, tag=True):
    """To a worker: carry out a command, in the order they come, a Prepare beside them, and say Done. `asked` is its own
    Ask, if it was one."""

    at: int
    command: Command | Prepare
    asked: int | None


class Measure(Struct, frozen=True, tag=True):
    """To a worker: say Measured."""

    at: int


class Answer(Struct, frozen=True, tag=True):
    """To the worker that asked: how many workers carried out its command, and how many others did not. `refused` is the
    name of an error of ours, and its text, where that is the answer."""

    at: int
    done: int
    failed: int
    refused: tuple[str, str] | None = None


class Gathered(Struct, frozen=True, tag=True):
    """To the worker that asked: the metrics of all."""

    at: int
    families: list[Family]


class Reported(Struct, frozen=True, tag=True):
    """To the worker that asked: what the supervisor knows."""

    at: int
    report: Report


class Loaded(Struct, frozen=True, tag=True):
    """From a worker: what it serves as soon as it may listen."""

    inventory: Inventory


class Failed(Struct, frozen=True, tag=True):
    """From a worker that cannot start."""

    reason: str


class Serving(Struct, frozen=True, tag=True):
    """From a worker that listens."""


class Done(Struct, frozen=True, tag=True):
    """From a worker: a command was carried out, or not, with the reason; and what it serves now."""

    at: int
    failure: str | None
    inventory: Inventory


class Measured(Struct, frozen=True, tag=True):
    """From a worker: its own metrics."""

    at: int
    families: list[Family]


class Ask(Struct, frozen=True, tag=True):
    """From a worker: have all carry out a command, or what a wish leads to, and Answer."""

    at: int
    command: Command | ChangeModel


class Gather(Struct, frozen=True, tag=True):
    """From a worker: have all measured, and say Gathered."""

    at: int


class Inquire(Struct, frozen=True, tag=True):
    """From a worker: say Reported."""

    at: int


ToWorker = Begin | Listen | Do | Measure | Answer | Gathered | Reported
FromWorker = Loaded | Failed | Serving | Done | Measured | Ask | Gather | Inquire

M = TypeVar("M")


class Link(Generic[M]):
    """One end: any message goes out, messages of one kind come in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: Any) -> None:
        self._reader, self._writer = reader, writer
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(incoming)

    async def send(self, message: ToWorker | FromWorker) -> None:
        """A message to an end that is no more is lost: `receive` says so."""
        with suppress(ConnectionError):
            self._writer.write(framed(message))
            await self._writer.drain()

    async def receive(self) -> M | None:
        """The next message; None when the other end is no more, or no longer makes sense."""
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            return None

    def close(self) -> None:
        self._writer.close()


async def link(end: socket.socket, incoming: Any) -> Link[Any]:
    reader, writer = await asyncio.open_unix_connection(sock=end)
    return Link(reader, writer, incoming)


def framed(message: ToWorker | FromWorker) -> bytes:
    content = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(content)) + content


def receive_begin(end: socket.socket) -> Begin:
    """The first message, before there is an event loop. Raises EOFError where the supervisor is no more."""
    (length,) = LENGTH.unpack(_exactly(end, LENGTH.size))
    return msgspec.msgpack.decode(_exactly(end, length), type=Begin)


def _exactly(end: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        chunk = end.recv(count - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return received
