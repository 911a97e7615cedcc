"""Bundles on disk: `<root>/<name>/<version>/`, written whole or not at all, opened only after verification."""

import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from bundle import checks, vocabulary
from bundle.drift import ScoreBins
from bundle.encoder import Encoder
from bundle.errors import BundleError, BundleInvalid
from bundle.locks import held
from bundle.manifest import File, Manifest
from bundle.schema import FeatureSchema
from bundle.signature import SIGNATURE, refuse_untrusted
from bundle.vocabulary import Vocabulary

STAGING = ".staging-"
MANIFEST, SCHEMA, VOCABULARY = "manifest.json", "schema.json", "vocabulary.npz"
GOLDEN_ROWS, GOLDEN_ANSWERS, REPORT, WEIGHTS = "golden.json", "golden.npz", "report.json", "weights.bin"

Describe = Callable[[int, dict[str, File]], Manifest]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. `digest` is the sha256 of its manifest.json, which holds the sha256 of every other file."""

    path: Path
    manifest: Manifest
    digest: str
    schema: FeatureSchema
    vocabularies: dict[str, Vocabulary]
    encoder: Encoder

    @cached_property
    def golden_rows(self) -> list[dict[str, Any]]:
        """Raw rows drawn field by field from the vocabulary; the first one has every field known."""
        return TypeAdapter(list[dict[str, Any]]).validate_json((self.path / GOLDEN_ROWS).read_bytes())

    @cached_property
    def golden_answers(self) -> dict[str, NDArray[np.float32]]:
        """onnxruntime's own answers for the golden rows, on the CPU: `logit` and every output of the explain graph."""
        with (self.path / GOLDEN_ANSWERS).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)

    @cached_property
    def report(self) -> dict[str, Any]:
        return TypeAdapter(dict[str, Any]).validate_json((self.path / REPORT).read_bytes())

    @cached_property
    def score_bins(self) -> ScoreBins | None:
        """How the scores of the validation rows were spread; older bundles, small ones and rankings do not say."""
        return ScoreBins.model_validate(self.report["scores"]) if "scores" in self.report else None


def versions(root: Path, name: str) -> list[int]:
    """The versions of a model under `root`, ascending. Staged and foreign folders do not count."""
    folder = root / name
    found = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return sorted(int(version) for version in found if version.isascii() and version.isdigit() and version[0] != "0")


@contextmanager
def stage(root: Path, name: str) -> Iterator[Path]:
    """A temporary folder beside the versions of `name`; what is not published when the block ends is deleted.

    So are those that killed processes have left there.
    """
    parent = root / name
    parent.mkdir(parents=True, exist_ok=True)
    with held(parent):
        for left in parent.glob(f"{STAGING}*"):
            with held(left, wait=False) as is_ours:
                if is_ours:
                    shutil.rmtree(left, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=STAGING, dir=parent))
        holding = ExitStack()
        holding.enter_context(held(staged))
    staged.chmod(0o755)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        holding.close()


def publish(staged: Path, describe: Describe) -> Path:
    """Turn a staged folder into the next version and return its path.

    `describe(version, files)` makes the manifest. Files and folder are fsynced before the rename, the parent after
    it, so the version is whole or absent; a version that exists is never overwritten.
    """
    parent = staged.parent
    files = {file.name: _describe_file(file) for file in sorted(staged.iterdir())}
    version = max(versions(parent.parent, parent.name), default=0)
    while True:
        version += 1
        write_synced(staged / MANIFEST, checks.sealed(describe(version, files)))
        for file in staged.iterdir():
            sync(file)
        sync(staged)
        try:
            os.rename(staged, parent / str(version))
        except OSError:
            if (parent / str(version)).exists():  # another writer, or a foreign file, took this number: take the next
                continue
            raise
        sync(parent)
        return parent / str(version)


def open_verified(path: Path, *, trusted_keys: frozenset[str] = frozenset()) -> Bundle:
    """Open the bundle in `path` after checking everything its manifest promises.

    Where there are `trusted_keys` (public Ed25519 keys, hexadecimal), one of them has to have signed the manifest.

    Raises BundleInvalid with the reason: format and checksum of the manifest, exact list of regular files, length and
    sha256 of each, weights that are numbers, schema and vocabulary that fit together.
    """
    if not (path / MANIFEST).is_file():
        raise BundleInvalid(path, f"there is no {MANIFEST} in it (a bundle is a folder <name>/<version>)")
    with _blaming(path, MANIFEST):
        if (length := (path / MANIFEST).stat().st_size) > checks.MANIFEST_BYTES:
            raise ValueError(f"{length:,} bytes are too many (allowed: {checks.MANIFEST_BYTES:,})")
        raw = (path / MANIFEST).read_bytes()
        manifest = Manifest.model_validate_json(raw)
        checks.refuse_changed(raw, manifest)
    _verify_files(path, manifest)
    if trusted_keys:
        refuse_untrusted(path, raw, trusted_keys)
    with _blaming(path, SCHEMA):
        schema = FeatureSchema.model_validate_json((path / SCHEMA).read_bytes())
        _verify_schema(manifest, schema)
    if WEIGHTS in manifest.files:
        with _blaming(path, WEIGHTS):
            checks.refuse_weights(path / WEIGHTS, manifest.graphs.values())
    with _blaming(path, VOCABULARY):
        checks.refuse_arrays(path / VOCABULARY)
        loaded = vocabulary.load(path / VOCABULARY)
        vocabularies = {schema.names[position]: values for position, values in loaded.items()}
        encoder = Encoder(schema, vocabularies)
    digest = hashlib.sha256(raw).hexdigest()
    bundle = Bundle(path, manifest, digest, schema, vocabularies, encoder)
    _verify_golden(bundle)
    with _blaming(path, REPORT):
        _ = bundle.score_bins
    return bundle


@contextmanager
def _blaming(path: Path, name: str) -> Iterator[None]:
    """Turns what reading the file `name` raises into BundleInvalid."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise BundleInvalid(path, f"{name} at {where}: {first['msg']}") from None
    except (BundleError, BadZipFile, EOFError, LookupError, MemoryError, TypeError, ValueError, zlib.error) as error:
        raise BundleInvalid(path, f"{name}: {error}") from error


def _verify_files(path: Path, manifest: Manifest) -> None:
    found, expected = {entry.name for entry in path.iterdir()}, {MANIFEST, *manifest.files}
    if SIGNATURE in found:  # of the manifest, which cannot know it
        expected.add(SIGNATURE)
    for problem, names in (("is missing", expected - found), ("is not in the manifest", found - expected)):
        if names:
            raise BundleInvalid(path, f"{min(names)} {problem}")
    needed = {SCHEMA, VOCABULARY, GOLDEN_ROWS, GOLDEN_ANSWERS, REPORT} | {g.file for g in manifest.graphs.values()}
    if needed - expected:
        raise BundleInvalid(path, f"{min(needed - expected)} is not in the manifest")
    for name in sorted(expected):
        file = path / name
        if file.is_symlink() or not file.is_file() or file.stat().st_nlink > 1:
            raise BundleInvalid(path, f"{name} is not a regular file of its own (a link, a folder or a device)")
    for name, promised in manifest.files.items():
        if promised.length > checks.limit_of(name):
            raise BundleInvalid(path, f"{name} may have {checks.limit_of(name):,} bytes, not {promised.length:,}")
        if (length := (path / name).stat().st_size) != promised.length:
            raise BundleInvalid(path, f"{name} has {length} bytes, the manifest says {promised.length}")
        if _describe_file(path / name).sha256 != promised.sha256:
            raise BundleInvalid(path, f"the sha256 of {name} is not the manifest's")


def _verify_golden(bundle: Bundle) -> None:
    with _blaming(bundle.path, GOLDEN_ROWS):
        rows = bundle.golden_rows
        if len(rows) > checks.GOLDEN_ROWS:
            raise ValueError(f"{len(rows):,} rows are too many (allowed: {checks.GOLDEN_ROWS})")
        bundle.encoder.rows(rows)
    with _blaming(bundle.path, GOLDEN_ANSWERS):
        checks.refuse_arrays(bundle.path / GOLDEN_ANSWERS)
        answers = bundle.golden_answers
    expected = {"logit", *bundle.manifest.graphs["explain"].outputs}
    if set(answers) != expected or not rows:
        raise BundleInvalid(bundle.path, f"{GOLDEN_ANSWERS} does not answer the rows of {GOLDEN_ROWS}")
    for name, shape in _shapes(bundle, len(rows)).items():
        if answers[name].shape != shape:
            raise BundleInvalid(bundle.path, f"{GOLDEN_ANSWERS}: {name} has shape {answers[name].shape}, not {shape}")
    if bundle.manifest.exact and np.any(answers["residual"]):
        raise BundleInvalid(bundle.path, f"{MANIFEST} says exact, but {GOLDEN_ANSWERS} has a residual")


def _shapes(bundle: Bundle, rows: int) -> dict[str, tuple[int, ...]]:
    schema, axes = bundle.schema, {size.name: size.axis for size in bundle.manifest.sizes}
    by_axis = {"field": (rows, len(schema.fields)), "pair": (rows, len(schema.pairs))}
    slot = (rows, sum(schema.widths))
    return (
        {"logit": (rows,), "bias": (), "residual": (rows,), "slot": slot}
        | by_axis
        | {name: by_axis[axis] for name, axis in axes.items()}
    )


def _verify_schema(manifest: Manifest, schema: FeatureSchema) -> None:
    """ValueError where the manifest speaks of other fields than the schema."""
    context, candidate = (schema.side(candidate=side) for side in (False, True))
    names = tuple(tuple(field.name for field in side) for side in (context, candidate))
    if (manifest.split.context, manifest.split.candidate) != names:
        raise ValueError(f"the split in {MANIFEST} does not name its fields")
    reads = {"rank_context": context, "rank_candidates": candidate}
    for name, graph in manifest.graphs.items():
        needs_values = any(field.needs_values for field in reads.get(name, schema.fields))
        if ("values" in graph.inputs) != needs_values:
            raise ValueError(f"the graphs in {MANIFEST} do not take what its fields need")


def _describe_file(path: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(sha256=digest, length=path.stat().st_size)


def write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
