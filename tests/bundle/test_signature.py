import os
from pathlib import Path

import pytest

import bundle
from bundle import BundleInvalid, signature
from bundle.signature import SigningRefused
from training.cli import main

SECRET = "11" * 32
PUBLIC = "d04ab232742bb4ab3a1368bd4615e4e6d0224ab71a016baf8520a332c9778737"  # of that secret, by RFC 8032


@pytest.fixture
def signed(tiny: Path, tmp_path: Path) -> Path:
    (tmp_path / "key").write_text(SECRET + "\n")
    assert main(["sign", str(tiny), "--key", str(tmp_path / "key")]) == 0
    return tiny


def refusal(path: Path, *trusted: str) -> str:
    with pytest.raises(BundleInvalid) as caught:
        bundle.open(path, trusted_keys=trusted)
    return caught.value.reason


def test_a_signed_bundle_opens_with_its_key_or_with_none_asked_for(signed: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\n{'ab' * 32}\n{PUBLIC}  # of the build machine\n")
    for trusted in ([PUBLIC], ["ab" * 32, PUBLIC], [str(tmp_path / "keys")], []):
        bundle.open(signed, trusted_keys=trusted)


def test_an_unsigned_bundle_or_a_foreign_key_is_refused(tiny: Path, signed: Path) -> None:
    assert refusal(signed, "ab" * 32) == f"it is signed with the key {PUBLIC}, which is not trusted"
    (signed / "signature.json").unlink()
    assert refusal(signed, PUBLIC) == "it is not signed, and only bundles signed with a trusted key are accepted"


def test_a_manifest_that_was_changed_is_not_what_was_signed(signed: Path) -> None:
    """A forger can mend every checksum, and not the signature."""
    manifest = signed / "manifest.json"
    text = manifest.read_text()
    checksum = text.split('"checksum": "')[1][:64]
    manifest.write_text(text.replace(f'"{checksum}"', "null"))
    bundle.open(signed)
    assert refusal(signed, PUBLIC) == "signature.json is not the signature of this manifest.json"


def test_changed_digits_of_a_signature_are_refused(signed: Path) -> None:
    file = signed / "signature.json"
    whole = file.read_text()
    for at in range(0, len(whole), 7):
        file.write_text(whole[:at] + ("0" if whole[at] != "0" else "1") + whole[at + 1 :])
        assert refusal(signed, PUBLIC)
    for content in ("", "[]", "{}", whole[:-1], whole + " " * 5000):
        file.write_text(content)
        assert refusal(signed, PUBLIC).startswith("signature.json does not hold a key and a signature")


def test_a_signature_may_not_be_a_link(signed: Path) -> None:
    os.rename(signed / "signature.json", signed.parent / "elsewhere")
    os.link(signed.parent / "elsewhere", signed / "signature.json")
    assert refusal(signed, PUBLIC).startswith("signature.json is not a regular file of its own")


@pytest.mark.parametrize(
    ("content", "place"), [("", "it is empty"), (f"{PUBLIC}\n# x\nabc\n", "line 3"), (None, "No such")]
)
def test_a_key_file_that_is_none_is_named(tmp_path: Path, content: str | None, place: str) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(SigningRefused, match=rf"keys'.*{place}"):
        signature.public_keys([str(tmp_path / "keys")])


def test_a_new_key_signs_and_is_for_its_owner_only(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "own.key"
    assert main(["keygen", str(key)]) == 0
    public = capsys.readouterr().out.strip()
    assert (tmp_path / "own.key.pub").read_text() == public + "\n"
    assert key.stat().st_mode & 0o777 == 0o600
    assert main(["sign", str(tiny), "--key", str(key)]) == 0
    bundle.open(tiny, trusted_keys=[str(tmp_path / "own.key.pub")])
    before = key.read_text()
    assert main(["keygen", str(key)]) == 1
    assert key.read_text() == before
    assert main(["sign", str(tiny), "--key", str(tiny / "report.json")]) == 1
    assert "expected a secret key of 64 hexadecimal digits" in capsys.readouterr().err
