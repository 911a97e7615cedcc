"""A bundle that was damaged anywhere, or promises too much, is refused with a reason and without much memory."""

import io
import json
import random
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundle
from bundle import BundleInvalid, checks
from bundle.manifest import Graph, Manifest, Table

Reseal = Callable[[], Path]
FLIPS = 200


def reason(path: Path) -> str:
    with pytest.raises(BundleInvalid) as caught:
        bundle.open(path)
    return caught.value.reason


def test_200_flipped_bits_and_truncations_are_refused(tiny: Path) -> None:
    """Half of them in the manifest, which no other file vouches for."""
    draw = random.Random(1)
    files = sorted(tiny.iterdir())
    for number in range(FLIPS):
        file = tiny / "manifest.json" if number % 2 else draw.choice(files)
        whole = file.read_bytes()
        at = draw.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
        file.write_bytes(whole[:at] if number % 10 == 0 else flipped)
        assert file.name in reason(tiny), f"{file.name}, byte {at}"
        file.write_bytes(whole)
    bundle.open(tiny)


def test_a_flipped_bit_of_the_manifest_may_leave_a_manifest(tiny: Path) -> None:
    """The control: without its checksum the manifest of another seed is as good as any."""
    raw = (tiny / "manifest.json").read_bytes()
    changed = json.loads(raw)
    changed["provenance"]["seed"] += 1
    (tiny / "manifest.json").write_text(json.dumps(changed, indent=2))
    assert reason(tiny) == "manifest.json: it was changed: its checksum is of other content"
    (tiny / "manifest.json").write_text(json.dumps(changed | {"checksum": None}))
    bundle.open(tiny)


def test_a_manifest_is_sealed_over_every_byte(tiny: Path) -> None:
    raw = (tiny / "manifest.json").read_bytes()
    manifest = Manifest.model_validate_json(raw)
    assert checks.sealed(manifest) == raw
    checks.refuse_changed(raw, manifest)
    with pytest.raises(ValueError, match="its checksum is of other content"):
        checks.refuse_changed(raw + b"\n", manifest)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused_wherever_it_stands(tiny: Path, reseal: Reseal, value: float) -> None:
    whole, draw = (tiny / "weights.bin").read_bytes(), random.Random(1)
    for _ in range(50):
        words = np.frombuffer(whole, "<f4").copy()
        at = draw.randrange(len(words))
        words[at] = value
        (tiny / "weights.bin").write_bytes(words.tobytes())
        assert reason(reseal()) == f"weights.bin: the weight at byte {4 * at:,} is not a finite number"


def test_weights_are_looked_at_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "WORDS", 100)
    words = np.zeros(1001, np.float32)
    words.tofile(tmp_path / "weights.bin")
    checks.refuse_weights(tmp_path / "weights.bin", [])
    words[1000] = np.nan
    words.tofile(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="byte 4,000 "):
        checks.refuse_weights(tmp_path / "weights.bin", [])


def test_in_a_table_of_fewer_bits_only_its_own_numbers_count(tmp_path: Path) -> None:
    whole = bytearray(np.zeros(64, np.float32).tobytes())
    whole[64:70] = b"\xff" * 6  # int8, the end of which is no whole word
    whole[128:136] = np.array([0x7BFF, 0, 0, 0], "<u2").tobytes()  # the largest float16 there is
    tables = {
        "eight": Table(file="weights.bin", dtype="int8", shape=(3, 2), offset=64),
        "sixteen": Table(file="weights.bin", dtype="float16", shape=(2, 2), offset=128),
    }
    graph = Graph(file="score.onnx", inputs=("ids",), outputs=("logit",), tables=tables)
    path = tmp_path / "weights.bin"
    path.write_bytes(whole)
    checks.refuse_weights(path, [graph, graph])
    for at, content in ((60, b"\x00\x00\xc0\x7f"), (134, b"\x00\x7e"), (136, b"\x00\x00\x80\xff")):
        path.write_bytes(whole[:at] + content + whole[at + len(content) :])
        with pytest.raises(ValueError, match=rf"the weight at byte {at} is not a finite number"):
            checks.refuse_weights(path, [graph])


def header(shape: str) -> bytes:
    """An array whose header says so, and no content."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("name", ["vocabulary.npz", "golden.npz"])
@pytest.mark.parametrize("shape", ["(1000000000000,)", "(4611686018427387904, 4)", "(2,)"])
def test_a_declared_shape_is_compared_before_anything_is_allocated(
    tiny: Path, reseal: Reseal, name: str, shape: str
) -> None:
    with zipfile.ZipFile(tiny / name, "w") as archive:
        archive.writestr("logit.npy", header(shape))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "logit.npy declares " in reason(reseal())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024, "KiB"


@pytest.mark.parametrize("name", ["vocabulary.npz", "golden.npz"])
def test_a_zip_bomb_is_not_unpacked(tiny: Path, reseal: Reseal, name: str) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros(2**22, np.float32))
    with zipfile.ZipFile(tiny / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logit.npy", content.getvalue())
    assert (tiny / name).stat().st_size < 2**15
    assert reason(reseal()) == f"{name}: logit.npy is compressed, which no array of a bundle is"


def test_a_file_may_not_be_longer_than_it_could_need(tiny: Path) -> None:
    manifest = json.loads((tiny / "manifest.json").read_bytes()) | {"checksum": None}
    manifest["files"]["golden.json"]["length"] = 2**40
    (tiny / "manifest.json").write_text(json.dumps(manifest))
    assert reason(tiny) == "golden.json may have 268,435,456 bytes, not 1,099,511,627,776"
    manifest["files"]["golden.json"]["length"] = 2**28
    (tiny / "manifest.json").write_text(json.dumps(manifest))
    assert reason(tiny).startswith("golden.json has ")


def test_tables_of_ten_gigabytes_are_no_absurdity() -> None:
    assert checks.limit_of("weights.bin") >= 100 * 10**9
    assert checks.limit_of("vocabulary.npz") >= 10 * 10**9


def test_a_manifest_without_end_is_not_read(tiny: Path) -> None:
    with (tiny / "manifest.json").open("r+b") as file:
        file.truncate(2**34)
    assert reason(tiny) == "manifest.json: 17,179,869,184 bytes are too many (allowed: 16,777,216)"


def lengthened(field: dict[str, Any]) -> dict[str, Any] | None:
    kind = field["kind"]
    return field | {"kind": kind | {"max_len": 4096}} if kind["kind"] == "multi" else None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda fields: fields * 2000, "at most 4096 items"),
        (
            lambda fields: [f | {"kind": f["kind"] | {"max_len": 4096}} for f in fields if "max_len" in f["kind"]] * 17,
            "",
        ),
    ],
    ids=["fields", "slots"],
)
def test_a_schema_without_end_is_refused(
    tiny: Path, reseal: Reseal, change: Callable[[list[dict[str, Any]]], object], expected: str
) -> None:
    schema = json.loads((tiny / "schema.json").read_bytes())
    schema["fields"] = change(schema["fields"])
    (tiny / "schema.json").write_text(json.dumps(schema))
    assert expected in reason(reseal())


def test_golden_rows_without_end_are_refused(tiny: Path, reseal: Reseal) -> None:
    (tiny / "golden.json").write_text("[{}" + ",{}" * 256 + "]")
    assert reason(reseal()) == "golden.json: 257 rows are too many (allowed: 256)"
