"""`python -m service`: settings, a socket, and uvicorn on it. `python -m service bench` measures one."""

import gc
import logging
import socket
import sys
from collections.abc import Sequence

import uvicorn

from service import logs, settings
from service.app import create_app
from service.bench import cli as bench
from service.settings import Settings, SettingsRefused

KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep an idle connection, or they would meet a closed one
DRAIN_SECONDS = 30  # without a limit one half-sent body would keep the process for ever

log = logging.getLogger("service")


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["bench"]:
        return bench.main(arguments[1:])
    try:
        chosen = settings.load(arguments)
        listener = _bind(chosen)
    except SettingsRefused as error:
        print(error, file=sys.stderr)
        return 1
    logs.configure(chosen.log_level)
    for sentence in settings.unknown_variables():
        log.warning("unknown variable", extra={"facts": {"reason": sentence}})
    config = uvicorn.Config(
        create_app(chosen),
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = _Server(config)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return 0
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # the models stay: no later collection has to walk through them
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            log.info("listening", extra={"facts": {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        log.info("stopped")  # here and not after run(), which ends the process by the signal that stopped it


def _bind(chosen: Settings) -> socket.socket:
    """A bound socket that does not listen yet: a client is turned away rather than kept waiting while bundles load."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            chosen.host, chosen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise SettingsRefused(
            f"cannot listen on {chosen.host}:{chosen.port} ({error.strerror}): "
            "choose another port with --port, FACTORLENS_PORT, or PORT= where make starts the service"
        ) from None
    return listener


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
