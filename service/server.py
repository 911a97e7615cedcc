"""uvicorn, as every process that answers requests runs it."""

import asyncio
import gc
import logging
import math
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp

from service.exchange import Express
from service.settings import Settings
from service.tls import Tls
from service.transport import LINGERING, Awaited, Limits, Protocol

CLOSE: Final = (b"connection", b"close")
KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep an idle connection, or they would meet a closed one
DRAIN_SECONDS = 30  # without a limit one half-sent body would keep the process for ever
SWEEP_SECONDS = 0.5  # between two looks at all connections for clients that take too long
MOST_DESCRIPTORS = 65_536  # that a process takes for itself
SPARE_DESCRIPTORS = 256  # that connections leave to files and to processes
YOUNG_OBJECTS = 10_000  # before a collection looks at them: those of answers under way are thousands, and no garbage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hooks:
    """What a server and its app say to each other: `leave`: be ready no more, and give up what takes long. `renew`:
    read again what was read from files, and may have changed. `late`: a client took longer than the settings allow,
    with what it was to do: head, body or answer. `has_failed`: only another process can help. `express` takes requests
    before the app does."""

    leave: Callable[[], None]
    renew: Callable[[], None]
    late: Callable[[str], None]
    has_failed: Callable[[], bool]
    express: Express


class Server(uvicorn.Server):
    """Answers with `app`; `announce` is called once it does.

    SIGTERM makes it a lame duck: the app leaves, and for `lame_duck` seconds it goes on answering, new connections,
    too, but closes each with its answer. Then, and at once on SIGINT, it stops listening, answers what it has accepted,
    for DRAIN_SECONDS at most, and returns, where uvicorn would end the process by the signal. SIGHUP has the app renew
    what it has read from files, and the certificate with it.

    Once its app has failed it does as after SIGTERM: whoever started the process is to start another one.
    """

    def __init__(
        self,
        app: ASGIApp,
        announce: Callable[[Sequence[socket.socket]], Awaitable[None]],
        hooks: Hooks,
        settings: Settings,
        tls: Tls | None = None,
    ) -> None:
        limits = Limits(_seconds(settings), _connections(), self._count_late, express=hooks.express)
        protocol: Any = partial(Protocol, limits)  # uvicorn calls it as it would call the class
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                lifespan="on",
                ws="none",
                http=protocol,
                timeout_graceful_shutdown=DRAIN_SECONDS,
                ssl_context_factory=None if tls is None else lambda *_: tls.context,
            )
        )
        self._announce, self._hooks, self._lame_duck = announce, hooks, settings.lame_duck
        self._tls, self._handshake = tls, settings.header_timeout
        self._late_ones = Counter[str]()
        self._is_crowded_by = limits.connections / 2
        self._is_leaving = False
        self._ends = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        for listener in sockets or []:
            self.servers.append(await self._listen(listener))
        gc.collect()
        gc.freeze()  # the models stay: no later collection has to walk through them
        gc.set_threshold(YOUNG_OBJECTS)
        self._sweeping = asyncio.create_task(self._sweep())
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._renew)
        await self._announce(sockets or [])

    async def _listen(self, listener: socket.socket) -> asyncio.Server:
        """What uvicorn does, who has no way to say how long a handshake of TLS may take: asyncio gives it a minute."""
        config = self.config
        protocol: Any = config.http_protocol_class
        return await asyncio.get_running_loop().create_server(
            partial(protocol, config=config, server_state=self.server_state, app_state=self.lifespan.state),
            sock=listener,
            ssl=config.ssl,
            backlog=config.backlog,
            ssl_handshake_timeout=self._handshake if config.ssl else None,
        )

    def _renew(self) -> None:
        self._hooks.renew()
        if self._tls:
            self._tls.renew()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self.started and self._lame_duck:
            self._is_leaving = True  # again, where all processes of a unit get the signal and then the parent's, too
            return
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if not self._is_leaving and self._hooks.has_failed():
            self._is_leaving = True
        if self._is_leaving and math.isinf(self._ends):
            self._become_lame_duck()
        return await super().on_tick(counter) or time.monotonic() >= self._ends

    def _become_lame_duck(self) -> None:
        self._ends = time.monotonic() + self._lame_duck
        self._hooks.leave()
        # uvicorn puts the latter, made anew every second from the former, before the headers of every answer, and
        # closes a connection after an answer that says so.
        self.config.encoded_headers.append(CLOSE)
        self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]
        log.info("leaving", extra={"facts": {"seconds": self._lame_duck}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._hooks.leave()
        await super().shutdown(sockets)
        self._sweeping.cancel()
        log.info("stopped")

    async def _sweep(self) -> None:
        """One look at all connections now and then costs less than a timer for each request. Goes on in a shutdown."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            connections = tuple(self.server_state.connections)
            crowded, now = len(connections) > self._is_crowded_by, time.monotonic()
            for connection in connections:
                assert isinstance(connection, Protocol)
                connection.sweep(now, period=SWEEP_SECONDS, crowded=crowded)
            if self._late_ones:
                log.info("slow clients", extra={"facts": dict(self._late_ones)})
                self._late_ones.clear()

    def _count_late(self, awaited: Awaited) -> None:
        self._hooks.late(awaited.value)
        self._late_ones[awaited.value] += 1


def _seconds(settings: Settings) -> dict[Awaited, float]:
    return {
        Awaited.HEAD: settings.header_timeout,
        Awaited.BODY: settings.body_timeout,
        Awaited.ANSWER: settings.body_timeout,
        Awaited.IDLE: KEEP_ALIVE_SECONDS,
        Awaited.LEAVE: LINGERING,
    }


def _connections() -> int:
    """How many there may be: most of the descriptors that the process may have, of which it takes all it can get."""
    if sys.platform == "win32":
        return MOST_DESCRIPTORS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if 0 < hard < MOST_DESCRIPTORS else MOST_DESCRIPTORS  # an infinity is below 0
    if 0 < soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(most - SPARE_DESCRIPTORS, SPARE_DESCRIPTORS)


async def announce(listeners: Sequence[socket.socket], *, scheme: str) -> None:
    """Log where the service listens."""
    for listener in listeners:
        host, port = listener.getsockname()[:2]
        log.info("listening", extra={"facts": {"url": f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"}})
