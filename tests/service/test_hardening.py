"""What the service says, or refuses, where the system does not hold it well."""

from pathlib import Path

import pytest

from service import __main__, hardening

HELD = """Name:\tpython
Uid:\t10001\t10001\t10001\t10001
CapPrm:\t0000000000000000
CapEff:\t0000000000000000
NoNewPrivs:\t1
"""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("10001\t10001\t10001\t10001", "0\t0\t0\t0", "it runs as root"),
        ("10001\t10001\t10001\t10001", "10001\t10001\t0\t10001", "it runs as root"),
        ("CapEff:\t0000000000000000", "CapEff:\t0000000000000400", "it has capabilities"),
        ("CapPrm:\t0000000000000000", "CapPrm:\t000001ffffffffff", "it has capabilities"),
        ("CapEff:\t0000000000000000\n", "", "it has capabilities"),
        ("NoNewPrivs:\t1", "NoNewPrivs:\t0", "it could gain privileges"),
        ("NoNewPrivs:\t1\n", "", "it could gain privileges"),
    ],
)
def test_each_weakness_is_seen(old: str, new: str, sentence: str) -> None:
    assert old in HELD
    (said,) = hardening.found(HELD.replace(old, new), root_is_read_only=True)
    assert said.startswith(sentence)


def test_a_process_that_is_held_well_has_none() -> None:
    assert hardening.found(HELD, root_is_read_only=True) == []
    (said,) = hardening.found(HELD, root_is_read_only=False)
    assert said.startswith("its root file system can be written to")
    assert len(hardening.found("", root_is_read_only=False)) == 4


def test_this_process_can_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(hardening.weaknesses()) < 5
    monkeypatch.setattr(hardening, "STATUS", tmp_path / "absent")
    (said,) = hardening.weaknesses()
    assert "/proc/self/status" in said


def test_a_hardened_service_does_not_start_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardening, "weaknesses", lambda: ["it runs as root", "it has capabilities"])
    assert __main__.main(["--hardened", "true"]) == 1
    assert (
        capsys.readouterr().err == "the setting hardened is true, and it is not: it runs as root; it has capabilities\n"
    )
