"""uvicorn, as every process that answers requests runs it."""

import gc
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

import uvicorn
from starlette.types import ASGIApp

from service.transport import Protocol

KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep an idle connection, or they would meet a closed one
DRAIN_SECONDS = 30  # without a limit one half-sent body would keep the process for ever
YOUNG_OBJECTS = 10_000  # before a collection looks at them: those of answers under way are thousands, and no garbage

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Answers with `app`; `announce` is called once it does."""

    def __init__(self, app: ASGIApp, announce: Callable[[Sequence[socket.socket]], Awaitable[None]]) -> None:
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
            )
        )
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # the models stay: no later collection has to walk through them
        gc.set_threshold(YOUNG_OBJECTS)
        await self._announce(sockets or [])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        log.info("stopped")  # here and not after run(), which ends the process by the signal that stopped it


async def announce(listeners: Sequence[socket.socket]) -> None:
    """Log where the service listens."""
    for listener in listeners:
        host, port = listener.getsockname()[:2]
        log.info("listening", extra={"facts": {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"}})
