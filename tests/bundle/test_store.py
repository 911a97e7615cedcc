import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundle
from bundle import BundleInvalid, store
from bundle.manifest import File, Manifest

Reseal = Callable[[], Path]
FILES = {"manifest.json", "schema.json", "vocabulary.npz", "golden.json", "golden.npz", "report.json", "weights.bin"}

# Publishes the folder argv[2] as a model in argv[1] and dies like a machine that loses its power.
DIES_WHILE_PUBLISHING = """
import os, shutil, signal, sys
from pathlib import Path
from bundle import store
from bundle.manifest import Manifest

root, source, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
manifest = Manifest.model_validate_json((source / "manifest.json").read_bytes())

def die(event, arguments):
    if event == moment:
        os.kill(os.getpid(), signal.SIGKILL)

with store.stage(root, "tiny-fm") as folder:
    for file in manifest.files:
        shutil.copy(source / file, folder)
    sys.addaudithook(die)
    store.publish(folder, lambda version, files: manifest.model_copy(update={"version": version, "files": files}))
"""


@pytest.fixture(scope="module")
def source(bundles: Path) -> Path:
    return bundles / "tiny-fm" / "1"


def publish(root: Path, source: Path, *, report: str = "{}") -> Path:
    """Publish the files of `source`, with another report, as the next version of tiny-fm under `root`."""
    manifest = Manifest.model_validate_json((source / "manifest.json").read_bytes())

    def describe(version: int, files: dict[str, File]) -> Manifest:
        return manifest.model_copy(update={"version": version, "files": files})

    with store.stage(root, "tiny-fm") as folder:
        for file in manifest.files:
            shutil.copy(source / file, folder)
        (folder / "report.json").write_text(report)
        return store.publish(folder, describe)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refusal(path: Path) -> str:
    """Why the bundle is not opened."""
    with pytest.raises(BundleInvalid) as caught:
        bundle.open(path)
    assert caught.value.path == path
    return caught.value.reason


def edit(file: Path, change: Callable[[Any], object]) -> None:
    """Change a document; a manifest then is one of before they were sealed."""
    document = json.loads(file.read_bytes())
    change(document)
    document |= {"checksum": None} if file.name == "manifest.json" else {}
    file.write_text(json.dumps(document))


def test_versions_grow_and_none_is_overwritten(tmp_path: Path, source: Path) -> None:
    first = publish(tmp_path, source)
    before = contents(first)
    second = publish(tmp_path, source, report='{"other": 1}')
    assert (first, second) == (tmp_path / "tiny-fm" / "1", tmp_path / "tiny-fm" / "2")
    assert contents(first) == before
    assert [store.open_verified(path).manifest.version for path in (first, second)] == [1, 2]
    assert sorted(entry.name for entry in (tmp_path / "tiny-fm").iterdir()) == ["1", "2"]


def test_a_number_that_is_taken_by_something_else_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "tiny-fm").mkdir()
    (tmp_path / "tiny-fm" / "1").write_text("a foreign file")
    assert publish(tmp_path, source).name == "2"
    assert (tmp_path / "tiny-fm" / "1").read_text() == "a foreign file"


def test_what_counts_as_a_version(tmp_path: Path) -> None:
    for name in ("10", "9", "0", "007", "٣", "-1", "1.0", ".staging-x", "backup"):
        (tmp_path / "m" / name).mkdir(parents=True)
    (tmp_path / "m" / "11").write_text("no folder")
    assert store.versions(tmp_path, "m") == [9, 10]
    assert store.versions(tmp_path, "absent") == []


def test_concurrent_publishers_get_different_numbers(tmp_path: Path, source: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda n: publish(tmp_path, source, report=f'{{"writer": {n}}}'), range(24)))
    assert sorted(int(path.name) for path in paths) == list(range(1, 25))
    for writer, path in enumerate(paths):
        opened = store.open_verified(path)
        assert (opened.manifest.version, opened.report) == (int(path.name), {"writer": writer})


def test_what_is_not_published_is_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), store.stage(tmp_path, "m") as folder:  # noqa: PT012
        (folder / "weights.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list((tmp_path / "m").iterdir()) == []


@pytest.mark.parametrize("moment", ["open", "os.rename"])
def test_a_crash_before_the_rename_leaves_no_version(tmp_path: Path, source: Path, moment: str) -> None:
    killed = subprocess.run([sys.executable, "-c", DIES_WHILE_PUBLISHING, tmp_path, source, moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "tiny-fm").iterdir()
    assert left.name.startswith(".staging-")
    assert store.versions(tmp_path, "tiny-fm") == []
    assert publish(tmp_path, source).name == "1"
    assert [each.name for each in (tmp_path / "tiny-fm").iterdir()] == ["1"], "the next export removes what is left"


def test_what_another_export_is_writing_stays(tmp_path: Path) -> None:
    with store.stage(tmp_path, "m") as first:
        with store.stage(tmp_path, "m") as second:
            assert first.is_dir()
        assert not second.exists()
        assert first.is_dir()


def test_the_digest_is_the_sha256_of_the_manifest(source: Path) -> None:
    digest = subprocess.run(["sha256sum", source / "manifest.json"], capture_output=True, text=True, check=True).stdout
    assert store.open_verified(source).digest == digest.split()[0]


def test_each_missing_file_is_named(tiny: Path) -> None:
    names = {file.name for file in tiny.iterdir()}
    assert names > FILES
    for name in names:
        (tiny / name).rename(tiny.parent / name)
        assert refusal(tiny) == (
            "there is no manifest.json in it (a bundle is a folder <name>/<version>)"
            if name == "manifest.json"
            else f"{name} is missing"
        )
        (tiny.parent / name).rename(tiny / name)
    bundle.open(tiny)


def test_each_flipped_byte_is_named(tiny: Path) -> None:
    for file in sorted(tiny.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        promise = f"the sha256 of {file.name} is not the manifest's"
        assert refusal(tiny).startswith("manifest.json at top level: " if file.name == "manifest.json" else promise)
        file.write_bytes(whole)
    bundle.open(tiny)


def test_each_truncated_file_is_named(tiny: Path) -> None:
    for file in sorted(tiny.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        promise = f"{file.name} has {len(whole) - 1} bytes, the manifest says {len(whole)}"
        assert refusal(tiny).startswith("manifest.json at top level: " if file.name == "manifest.json" else promise)
        file.write_bytes(whole)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("schema.json")])
def test_nothing_else_may_lie_in_the_folder(tiny: Path, make: Callable[[Path], object]) -> None:
    make(tiny / ".extra")
    assert refusal(tiny) == ".extra is not in the manifest"


@pytest.mark.parametrize("name", ["manifest.json", "weights.bin"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_refused(tiny: Path, name: str, link: Callable[[Path, Path], None]) -> None:
    (tiny / name).rename(tiny.parent / name)
    link(tiny.parent / name, tiny / name)
    assert refusal(tiny).startswith(f"{name} is not a regular file of its own")


def with_entry(**entries: object) -> Callable[[dict[str, object]], None]:
    return lambda document: document.update(entries)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_entry(format_version=2), "manifest.json at format_version: Input should be 1"),
        (with_entry(comment="x"), "manifest.json at comment: Extra inputs are not permitted"),
        (with_entry(name="stats"), "the name 'stats' is reserved"),
        (with_entry(name="../up"), "manifest.json at name: "),
        (with_entry(version=0), "manifest.json at version: "),
        (with_entry(link="clip(2, 1)"), "a link is identity, sigmoid or clip(lo, hi) with lo < hi"),
        (lambda manifest: manifest["graphs"].pop("explain"), "a bundle has the graphs score and explain"),
        (lambda manifest: manifest["graphs"].pop("rank_context"), "a bundle has the graphs score and explain, and may"),
        (
            lambda manifest: manifest["graphs"]["rank_context"].update(outputs=["pairs", "pairs"]),
            "the rank_context graph answers a state, of different names",
        ),
        (
            lambda manifest: manifest["graphs"]["rank_candidates"].update(inputs=["ids", "values"]),
            "rank_candidates the state behind them",
        ),
        (lambda manifest: manifest["files"].pop("golden.npz"), "golden.npz is not in the manifest"),
        (lambda manifest: manifest["graphs"]["score"].update(file="other.onnx"), "other.onnx is not in the manifest"),
        (lambda manifest: manifest["files"].update({"../x": manifest["files"]["golden.npz"]}), "../x is missing"),
    ],
)
def test_a_manifest_that_cannot_be_right(tiny: Path, change: Callable[[Any], object], reason: str) -> None:
    edit(tiny / "manifest.json", change)
    assert re.search(re.escape(reason), refusal(tiny))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda schema: schema["fields"][0].update(size=99), "field 'user' needs a vocabulary of 97 values, found 20"),
        (lambda schema: schema["fields"].pop(), "schema.json: the split in manifest.json does not name its fields"),
        (lambda schema: schema["fields"].reverse(), "schema.json: the split in manifest.json does not name its fields"),
        (lambda schema: schema["fields"][3].update(scale=0), "schema.json at fields.3.scale: "),
        (lambda schema: schema["fields"][3].update(size=9), "schema.json at fields.3: .* takes 2 ids, not 9"),
        (lambda schema: schema["fields"][1].update(name="user"), "two fields have the same name"),
    ],
)
def test_a_schema_that_does_not_fit(tiny: Path, reseal: Reseal, change: Callable[[Any], object], reason: str) -> None:
    edit(tiny / "schema.json", change)
    assert re.search(reason, refusal(reseal()))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"no zip"], ids=["empty", "broken zip", "no zip"])
@pytest.mark.parametrize("name", ["vocabulary.npz", "golden.npz"])
def test_arrays_that_cannot_be_read(tiny: Path, reseal: Reseal, name: str, content: bytes) -> None:
    (tiny / name).write_bytes(content)
    assert refusal(reseal()).startswith(f"{name}: ")


def test_a_vocabulary_that_is_no_utf8(tiny: Path, reseal: Reseal) -> None:
    with np.load(tiny / "vocabulary.npz") as arrays:
        spoilt = dict(arrays)
    spoilt["0.blob"] = spoilt["0.blob"] | 0x80
    np.savez(tiny / "vocabulary.npz", **spoilt)
    assert refusal(reseal()).startswith("vocabulary.npz: 'utf-8' codec can't decode")


def test_pickled_arrays_are_never_loaded(tiny: Path, reseal: Reseal) -> None:
    np.savez(tiny / "golden.npz", logit=np.array([object], dtype=object))
    assert refusal(reseal()) == "golden.npz: Object arrays cannot be loaded when allow_pickle=False"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["logit", "field", "pair", "residual", "bias"])
def test_golden_answers_that_are_no_numbers(tiny: Path, reseal: Reseal, name: str, value: float) -> None:
    with np.load(tiny / "golden.npz") as arrays:
        spoilt = dict(arrays)
    spoilt[name].reshape(-1)[-1] = value
    np.savez(tiny / "golden.npz", **spoilt)
    exact = "manifest.json says exact, but golden.npz has a residual"
    assert refusal(reseal()) == (exact if name == "residual" else f"replaying the golden rows gave another {name}")


@pytest.mark.parametrize("rows", ["[]", "[{}]", "{}", "[1]", "no JSON"])
def test_golden_rows_that_do_not_fit_their_answers(tiny: Path, reseal: Reseal, rows: str) -> None:
    (tiny / "golden.json").write_text(rows)
    assert re.match(r"golden.json|golden.npz: logit has shape|golden.npz does not answer", refusal(reseal()))


def test_a_report_that_is_none(tiny: Path, reseal: Reseal) -> None:
    (tiny / "report.json").write_text("[]")
    assert refusal(reseal()).startswith("report.json at top level: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda manifest: manifest["sizes"].append({"name": "nope", "axis": "pair"}),
            "the explain graph answers .*nope",
        ),
        (lambda manifest: manifest["graphs"]["score"].update(inputs=["foo"]), "a graph takes ids, or ids and values"),
        (lambda manifest: manifest["graphs"]["score"].update(inputs=["ids"]), "do not take what its fields need"),
        (lambda manifest: manifest["split"].update(context=["user"]), "the split in manifest.json does not name"),
    ],
)
def test_a_manifest_that_promises_something_else(tiny: Path, change: Callable[[Any], object], reason: str) -> None:
    edit(tiny / "manifest.json", change)
    assert re.search(reason, refusal(tiny))


def test_a_size_on_the_wrong_axis(bundles: Path, tmp_path: Path) -> None:
    afm = shutil.copytree(bundles / "tiny-afm" / "1", tmp_path / "afm")
    edit(afm / "manifest.json", lambda manifest: manifest["sizes"][0].update(axis="field"))
    assert refusal(afm) == "golden.npz: attention has shape (32, 6), not (32, 4)"
