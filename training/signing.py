"""`keygen` and `sign`: a bundle that says who made it."""

import argparse
import os
from pathlib import Path
from typing import Any

import bundle
from bundle import signature, store
from training.arguments import command
from training.errors import TrainingError
from training.progress import say


def add_signing(commands: Any) -> None:
    """The two commands, as a part of the command line."""
    keygen = command(
        commands,
        "keygen",
        _keygen,
        "make a key to sign bundles with",
        """\
        Write a new Ed25519 key: KEY holds the secret, readable by its owner only, and KEY.pub the public key, which the
        service takes as trusted_keys. A key that exists is never overwritten.""",
        "python -m training keygen ~/factorlens.key",
    )
    keygen.add_argument("key", type=Path, help="the file to write the secret key to")
    sign = command(
        commands,
        "sign",
        _sign,
        "sign a bundle",
        """\
        Verify a bundle and write signature.json beside its manifest: the Ed25519 signature of manifest.json, which
        holds the sha256 of every other file. A signature that is there is replaced.""",
        "python -m training sign artifacts/demo-afm/1 --key ~/factorlens.key",
    )
    sign.add_argument("bundle", type=Path, help="a bundle folder, artifacts/<name>/<version>")
    sign.add_argument("--key", type=Path, required=True, help="a secret key that keygen wrote")


def _keygen(options: argparse.Namespace) -> None:
    secret, public = signature.new_key()
    beside = options.key.with_name(f"{options.key.name}.pub")
    for path, content, mode in ((options.key, secret, 0o600), (beside, public, 0o644)):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            raise TrainingError(f"{str(path)!r} exists: choose another name") from None
        with os.fdopen(descriptor, "w") as file:
            file.write(content + "\n")
    say(f"wrote {options.key} (secret: keep it) and {beside} (for the service's trusted_keys)")
    print(public)


def _sign(options: argparse.Namespace) -> None:
    path: Path = options.bundle
    bundle.open(path)
    made = signature.sign((path / store.MANIFEST).read_bytes(), options.key.read_text().strip())
    staged = path.parent / f".signature-{path.name}"  # not in the bundle, which may hold nothing else
    store.write_synced(staged, made.model_dump_json().encode())
    os.replace(staged, path / signature.SIGNATURE)
    store.sync(path)
    bundle.open(path, trusted_keys=[made.key])
    say(f"{path} is signed with the key {made.key}")
