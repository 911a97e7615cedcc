"""Bundles tried in a process of their own before the service opens them: see `service.trial`."""

import asyncio
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from signal import Signals
from typing import Final

import msgspec
from msgspec import Struct

from bundle.device import Provider
from service import folder
from service.control import Refused
from service.settings import PREFIX, Settings

SECONDS: Final = 300.0  # that one bundle may take: TensorRT builds engines
START_SECONDS: Final = 60.0  # that the process may take to start
AMPLE_TIMES, AMPLE_BYTES = 4, 500 * 10**6  # of its size, and beside: with as much no bundle lacks memory
SAID_LINES: Final = 100  # of its stderr, that are kept for the log

log = logging.getLogger(__name__)


class Candidate(Struct, frozen=True):
    """A version that may come to serve."""

    model: str
    version: str
    digest: str


class Order(Struct, frozen=True):
    """What to try, [(path, digest)], as which settings have it, with at most so many `bytes` of memory."""

    bundles: list[tuple[str, str]]
    provider: Provider
    threads: int
    trusted_keys: list[str]
    device: int
    tf32: bool
    cuda_graphs: bool
    tensorrt_cache: str | None
    bytes: int | None
    seconds: float


class Ready(Struct, frozen=True, tag=True):
    """The process has started."""


class Verdict(Struct, frozen=True, tag=True):
    """Of one bundle: why it was refused, if it was, `said` for the log alone, and the memory it takes beside files."""

    refused: Refused | None
    said: str = ""
    grown: int = 0


async def run(settings: Settings, candidates: Sequence[Candidate], room: int | None) -> list[Verdict]:
    """A verdict on each of them. One that ends its process is refused; the others get another process."""
    verdicts: list[Verdict] = []
    while len(verdicts) < len(candidates):
        verdicts += await _round(settings, candidates[len(verdicts) :], room)
    for candidate, verdict in zip(candidates, verdicts, strict=True):
        facts: dict[str, object] = {"model": candidate.model, "version": int(candidate.version)}
        if verdict.refused:
            log.error("rejected", extra={"facts": facts | {"reason": verdict.refused.reason, "said": verdict.said}})
        else:
            log.info("tried", extra={"facts": facts | {"digest": candidate.digest, "bytes": verdict.grown}})
    return verdicts


async def _round(settings: Settings, candidates: Sequence[Candidate], room: int | None) -> list[Verdict]:
    """The verdicts of one process: on all, or on those up to the one that ended it."""
    verdicts: list[Verdict] = []
    try:
        process = await _start()
    except OSError as error:  # no memory, no descriptor
        failed = f"no process could be started to try it: {error.strerror}"
        return [Verdict(Refused(failed, each.digest, passing=True)) for each in candidates]
    async with _listening(process) as said:
        assert process.stdin
        process.stdin.write(msgspec.json.encode(_order(settings, candidates, room)) + b"\n")
        answer, ended = await _answer(process, START_SECONDS)
        is_ready = answer is not None
        while is_ready and not ended and len(verdicts) < len(candidates):
            answer, ended = await _answer(process, SECONDS)
            if isinstance(answer, Verdict):
                verdicts.append(answer)
    if not is_ready:
        failed = f"no process could be started to try it: it {ended}"
        return [Verdict(Refused(failed, each.digest, passing=True), "\n".join(said)) for each in candidates]
    if ended:
        candidate, reason = candidates[len(verdicts)], f"it was tried in a process of its own, which {ended}"
        passing = _may_pass(ended, folder.size(_path(settings, candidate)), room)
        verdicts.append(Verdict(Refused(reason, candidate.digest, passing=passing), "\n".join(said)))
    return verdicts


def _may_pass(ended: str, size: int, room: int | None) -> bool:
    """Whether time or memory ran short, or may have, so that the same bundle may be good another time."""
    if "SIGABRT" in ended:  # as of C++ that gets no memory
        return room is not None and room < AMPLE_TIMES * size + AMPLE_BYTES
    return any(sign in ended for sign in ("SIGKILL", "SIGXCPU", "longer than"))


def _path(settings: Settings, candidate: Candidate) -> Path:
    return settings.bundles / candidate.model / candidate.version


async def _answer(process: Process, seconds: float) -> tuple[Ready | Verdict | None, str]:
    """The next line it says; or what became of it instead."""
    assert process.stdout
    try:
        async with asyncio.timeout(seconds):
            line = await process.stdout.readline()
            if line.endswith(b"\n"):
                return msgspec.json.decode(line, type=Ready | Verdict), ""
            code = await process.wait()
    except TimeoutError:
        return None, f"took longer than {seconds:g} seconds"
    except (ValueError, msgspec.DecodeError):
        return None, "gave no answer that makes sense"
    return None, f"was ended by {Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


async def _start() -> Process:
    """A new interpreter. Raises OSError."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "service.trial",
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        limit=2**20,
        env={name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)},
        start_new_session=True,
    )


@asynccontextmanager
async def _listening(process: Process) -> AsyncIterator[deque[str]]:
    """The last lines of its stderr; it is no more when the block ends."""
    said: deque[str] = deque(maxlen=SAID_LINES)
    listening = asyncio.create_task(_listen(process, said))
    try:
        yield said
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await listening


async def _listen(process: Process, said: deque[str]) -> None:
    assert process.stderr
    with suppress(ValueError):  # a line without end
        async for line in process.stderr:
            said.append(line.decode(errors="replace").rstrip())


def _order(settings: Settings, candidates: Sequence[Candidate], room: int | None) -> Order:
    paths = [(str(_path(settings, each)), each.digest) for each in candidates]
    gpu = settings.gpu
    return Order(
        bundles=paths,
        provider=settings.provider,
        threads=settings.threads,
        trusted_keys=list(settings.trusted_keys or ()),
        device=gpu.number,
        tf32=gpu.tf32,
        cuda_graphs=gpu.cuda_graphs,
        tensorrt_cache=None if gpu.tensorrt_cache is None else str(gpu.tensorrt_cache),
        bytes=room,
        seconds=SECONDS,
    )
