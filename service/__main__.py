"""`python -m service`: settings, a socket, and on it a server, or a supervisor of several; `bench` measures one."""

import logging
import socket
import sys
from collections.abc import Sequence

from bundle import device
from service import logs, settings, supervisor
from service.app import create_app
from service.bench import cli as bench
from service.server import Server, announce
from service.settings import Settings, SettingsRefused

log = logging.getLogger("service")


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["bench"]:
        return bench.main(arguments[1:])
    logs.keep_stderr()
    try:
        chosen = settings.load(arguments)
        if chosen.workers > 1 and sys.platform != "linux":
            raise SettingsRefused(f"workers (--workers): expected 1 on {sys.platform}, which deals no connections out")
        if chosen.workers > 1 and chosen.provider != "cpu":
            chosen = settings.one_for_each_gpu(chosen, device.count())
        listener = _bind(chosen)
    except SettingsRefused as error:
        print(error, file=sys.stderr)
        return 1
    logs.configure(chosen.log_level)
    for sentence in settings.unknown_variables():
        log.warning("unknown variable", extra={"facts": {"reason": sentence}})
    if chosen.workers > 1:
        return supervisor.run(chosen, listener)
    app = create_app(chosen)
    server = Server(app, announce, app.hooks, chosen)
    server.run(sockets=[listener])
    return 0 if server.started and not app.hooks.has_failed() else 1


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
