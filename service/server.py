"""uvicorn, as every process that answers requests runs it."""

import asyncio
import gc
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from service.tls import Tls
from service.transport import Protocol

CLOSE: Final = (b"connection", b"close")
KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep an idle connection, or they would meet a closed one
DRAIN_SECONDS = 30  # without a limit one half-sent body would keep the process for ever
YOUNG_OBJECTS = 10_000  # before a collection looks at them: those of answers under way are thousands, and no garbage

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Answers with `app`; `announce` is called once it does.

    SIGTERM makes it a lame duck: `leave` is called, and for `lame_duck` seconds it goes on answering, new connections,
    too, but closes each with its answer. Then, and at once on SIGINT, it stops listening, answers what it has accepted,
    for DRAIN_SECONDS at most, and returns, where uvicorn would end the process by the signal. SIGHUP calls
    `renew`, and reads the certificate again where there is one.
    """

    def __init__(
        self,
        app: ASGIApp,
        announce: Callable[[Sequence[socket.socket]], Awaitable[None]],
        leave: Callable[[], None],
        renew: Callable[[], None],
        *,
        lame_duck: float,
        tls: Tls | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                lifespan="on",
                ws="none",
                http=Protocol,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=DRAIN_SECONDS,
                ssl_context_factory=None if tls is None else lambda *_: tls.context,
            )
        )
        self._announce, self._leave, self._renew, self._lame_duck = announce, leave, renew, lame_duck
        self._tls = tls
        self._is_leaving = False
        self._ends = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # the models stay: no later collection has to walk through them
        gc.set_threshold(YOUNG_OBJECTS)
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._read_again)
        await self._announce(sockets or [])

    def _read_again(self) -> None:
        self._renew()
        if self._tls:
            self._tls.renew()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self.started and self._lame_duck:
            self._is_leaving = True  # again, where all processes of a unit get the signal and then the parent's, too
            return
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._is_leaving and math.isinf(self._ends):
            self._become_lame_duck()
        return await super().on_tick(counter) or time.monotonic() >= self._ends

    def _become_lame_duck(self) -> None:
        self._ends = time.monotonic() + self._lame_duck
        self._leave()
        # uvicorn puts the latter, made anew every second from the former, before the headers of every answer, and
        # closes a connection after an answer that says so.
        self.config.encoded_headers.append(CLOSE)
        self.server_state.default_headers.append(CLOSE)
        log.info("leaving", extra={"facts": {"seconds": self._lame_duck}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        log.info("stopped")


async def announce(listeners: Sequence[socket.socket], *, scheme: str) -> None:
    """Log where the service listens."""
    for listener in listeners:
        host, port = listener.getsockname()[:2]
        log.info("listening", extra={"facts": {"url": f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"}})
