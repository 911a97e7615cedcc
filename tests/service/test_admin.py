"""Who may change what is served."""

from typing import Any

import pytest

from service.admin import Gate
from service.errors import Forbidden
from service.settings import Settings


def scope(host: str | None, **headers: str) -> dict[str, Any]:
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "client": host and (host, 1), "headers": sent}


def test_the_gate_is_shut_by_default_and_open_to_this_machine_or_to_the_key() -> None:
    key = "sésame-of-the-tests"
    shut, local = Gate(Settings()), Gate(Settings(admin=True))
    keyed = Gate(Settings.model_validate({"admin": True, "admin_key": key}))
    for gate, sent, passes in (
        (shut, scope("127.0.0.1"), False),
        (shut, scope("127.0.0.1", authorization=f"Bearer {key}"), False),
        (local, scope("127.0.0.1"), True),
        (local, scope("::1"), True),
        (local, scope("::ffff:127.0.0.9"), True),
        (local, scope("10.0.0.1"), False),
        (local, scope("::ffff:10.0.0.1"), False),
        (local, scope("unix"), False),
        (local, scope(None), False),
        (local, scope("127.0.0.1", origin="https://page.example"), False),
        (keyed, scope("127.0.0.1"), False),
        (keyed, scope("10.0.0.1", authorization="Bearer sésame-of-the-test"), False),
        (keyed, scope("10.0.0.1", authorization=key), False),
    ):
        if passes:
            gate.check(sent)
        else:
            with pytest.raises(Forbidden):
                gate.check(sent)
    sent = scope("10.0.0.1") | {"headers": [(b"authorization", f"bearer {key}".encode())]}
    keyed.check(sent)


def test_a_key_is_never_shown() -> None:
    chosen = Settings.model_validate({"admin": True, "admin_key": "sesame-of-the-tests"})
    assert "sesame" not in f"{chosen!r} {chosen} {chosen.model_dump_json()}"
