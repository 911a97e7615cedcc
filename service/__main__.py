"""`python -m service`: settings, a socket, and on it a server, or a supervisor of several; `bench` measures one,
`keygen` makes keys for it."""

import logging
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial

from bundle import device
from service import aside, hardening, keygen, keys, logs, settings, supervisor
from service.app import create_app
from service.bench import cli as bench
from service.keys import KeysRefused
from service.server import Server, announce
from service.settings import Settings, SettingsRefused
from service.tls import Tls, TlsRefused

log = logging.getLogger("service")


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["bench"]:
        return bench.main(arguments[1:])
    if arguments[:1] == ["keygen"]:
        return keygen.main(arguments[1:])
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # while it loads; then it means to read files again
    logs.keep_stderr()
    try:
        chosen = settings.load(arguments)
        if chosen.api_keys is not None:
            keys.check(chosen.api_keys)
        tls = Tls.of(chosen)
        weak = hardening.weaknesses()
        if weak and chosen.hardened:
            raise SettingsRefused("the setting hardened is true, and it is not: " + "; ".join(weak))
        if chosen.workers > 1 and sys.platform != "linux":
            raise SettingsRefused(f"workers (--workers): expected 1 on {sys.platform}, which deals no connections out")
        if chosen.workers > 1 and chosen.provider != "cpu":
            chosen = settings.one_for_each_gpu(chosen, device.count())
        settings.check_bundles(chosen)
        listener = _bind(chosen)
    except (SettingsRefused, KeysRefused, TlsRefused) as error:
        print(error, file=sys.stderr)
        return 1
    logs.configure(chosen.log_level)
    if weak:
        log.info("not hardened", extra={"facts": {"reasons": weak}})
    for sentence in settings.unknown_variables():
        log.warning("unknown variable", extra={"facts": {"reason": sentence}})
    if chosen.workers > 1:
        return supervisor.run(chosen, listener)
    app = create_app(chosen)
    server = Server(app, partial(announce, scheme=chosen.scheme), app.hooks, chosen, tls)
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
    sys.exit(aside.end(main(sys.argv[1:])))
