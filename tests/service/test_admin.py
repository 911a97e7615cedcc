"""Who may change what is served."""

from typing import Any

import pytest

from service.admin import Gate
from service.errors import Forbidden, Unauthorized
from service.keys import Right, of_secret
from service.settings import Settings


def scope(host: str | None, *rights: Right, **headers: str) -> dict[str, Any]:
    """A request as it comes through a guard, with a key that has these rights where there are any."""
    sent = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    state = {"caller": of_secret("some", "secret", rights)} if rights else {}
    return {"type": "http", "client": host and (host, 1), "headers": sent, "state": state}


def test_the_gate_is_shut_by_default_and_open_to_this_machine_or_to_a_key() -> None:
    shut, local = Gate(Settings()), Gate(Settings(admin=True))
    keyed = Gate(Settings.model_validate({"admin": True, "admin_key": "sésame-of-the-tests"}))
    with_keys = Gate(Settings(admin=True, api_keys="some file"))
    for gate, sent, refusal in (
        (shut, scope("127.0.0.1"), Forbidden),
        (shut, scope("127.0.0.1", "admin"), Forbidden),
        (local, scope("127.0.0.1"), None),
        (local, scope("::1"), None),
        (local, scope("::ffff:127.0.0.9"), None),
        (local, scope("10.0.0.1"), Forbidden),
        (local, scope("::ffff:10.0.0.1"), Forbidden),
        (local, scope("unix"), Forbidden),
        (local, scope(None), Forbidden),
        (local, scope("127.0.0.1", origin="https://page.example"), Forbidden),
        (keyed, scope("127.0.0.1"), Unauthorized),
        (keyed, scope("10.0.0.1", "admin"), None),
        (with_keys, scope("127.0.0.1"), Unauthorized),
        (with_keys, scope("127.0.0.1", "predict", "explain"), Forbidden),
        (with_keys, scope("10.0.0.1", "predict", "admin", origin="https://page.example"), None),
    ):
        if refusal is None:
            gate.check(sent)
        else:
            with pytest.raises(refusal):
                gate.check(sent)


def test_a_key_is_never_shown() -> None:
    chosen = Settings.model_validate({"admin": True, "admin_key": "sesame-of-the-tests"})
    assert "sesame" not in f"{chosen!r} {chosen} {chosen.model_dump_json()}"
