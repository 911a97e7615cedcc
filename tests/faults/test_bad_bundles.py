"""Two hundred and more damaged bundles, put before a service that answers meanwhile: each is refused with a reason."""

import hashlib
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np
import pytest

from bundle import checks
from bundle.manifest import File, Manifest
from tests.faults.clients import ONE, PREDICT, Ask, Crowd, is_200, of_version
from tests.faults.conftest import Measured

Started = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
Damage = Callable[[Path], str]  # to a bundle; what the reason has to name
FLIPS = 120
TRUNCATIONS = 80
AT_ONCE = 35  # versions that come into the folder before a load
LOAD = "/v1/admin/models/tiny-fm:load"

pytestmark = pytest.mark.slow


def seal(bundle: Path, **changes: object) -> None:
    """Make a manifest good for whatever its files hold."""
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    files = {
        name: File(
            sha256=hashlib.sha256((bundle / name).read_bytes()).hexdigest(), length=(bundle / name).stat().st_size
        )
        for name in manifest.files
        if (bundle / name).is_file()
    }
    changed = manifest.model_copy(update={"files": manifest.files | files, **changes})
    (bundle / "manifest.json").write_bytes(checks.sealed(changed))


def flipped(name: str, draw: random.Random) -> Damage:
    def harm(bundle: Path) -> str:
        content = bytearray((bundle / name).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (bundle / name).write_bytes(content)
        return name

    return harm


def truncated(name: str, draw: random.Random) -> Damage:
    def harm(bundle: Path) -> str:
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[: draw.randrange(len(content))])
        return name

    return harm


def missing(name: str) -> Damage:
    def harm(bundle: Path) -> str:
        (bundle / name).unlink()
        return name

    return harm


def weight(value: float, draw: random.Random) -> Damage:
    """A number that is none, under a manifest that vouches for it."""

    def harm(bundle: Path) -> str:
        words = np.fromfile(bundle / "weights.bin", "<f4")
        words[draw.randrange(len(words))] = value
        words.tofile(bundle / "weights.bin")
        seal(bundle)
        return "weights.bin"

    return harm


def another(name: str, source: str) -> Damage:
    """A file with another one's content, under a manifest that vouches for it."""

    def harm(bundle: Path) -> str:
        shutil.copyfile(bundle / source, bundle / name)
        seal(bundle)
        return ""

    return harm


def extra(bundle: Path) -> str:
    (bundle / "extra.bin").write_bytes(b"more")
    return "extra.bin"


def linked(bundle: Path) -> str:
    (bundle / "weights.bin").rename(bundle.parent / f"weights-{bundle.name}")
    (bundle / "weights.bin").symlink_to(bundle.parent / f"weights-{bundle.name}")
    return "weights.bin"


def longer(bundle: Path) -> str:
    """Answers of another shape, under a manifest that vouches for them."""
    with np.load(bundle / "golden.npz") as arrays:
        changed = {
            name: np.concatenate([values, values[:1]]) if values.ndim else values for name, values in arrays.items()
        }
    np.savez(bundle / "golden.npz", **changed)
    seal(bundle)
    return "golden.npz"


def narrower(bundle: Path) -> str:
    """Weights that are a row short, under a manifest that vouches for them."""
    whole = (bundle / "weights.bin").read_bytes()
    (bundle / "weights.bin").write_bytes(whole[: len(whole) // 2 // 4 * 4])
    seal(bundle)
    return ""


def shuffled(bundle: Path) -> str:
    """Numbers, but not those that the golden answers are of."""
    words = np.fromfile(bundle / "weights.bin", "<f4")
    (words[::-1] * 2).tofile(bundle / "weights.bin")
    seal(bundle)
    return "golden rows"


def misplaced(bundle: Path) -> str:
    seal(bundle, version=1)
    return "version 1"


def damages(bundle: Path) -> Iterator[Damage]:
    draw, files = random.Random(1), sorted(each.name for each in bundle.iterdir())
    for at in range(FLIPS):
        yield flipped(files[at % len(files)], draw)
    for at in range(TRUNCATIONS):
        yield truncated(files[at % len(files)], draw)
    yield from (missing(name) for name in files)
    yield from (weight(value, draw) for value in (np.nan, np.inf, -np.inf))
    yield another("score.onnx", "explain.onnx")
    yield another("vocabulary.npz", "golden.npz")
    yield another("schema.json", "report.json")
    yield from (extra, linked, longer, narrower, shuffled, misplaced)


def rejected(url: str) -> dict[int, str]:
    model = httpx.get(f"{url}/v1/models/tiny-fm").json()
    assert (model["ready"], model["versions"]) == (True, [1])
    return {each["version"]: each["reason"] for each in model["rejected"]}


def copied(releases: Path, folder: Path, version: int) -> Path:
    target = folder / "tiny-fm" / str(version)
    shutil.copytree(releases / "2", target)
    seal(target, version=version)
    return target


def test_damaged_bundles_are_refused_while_the_old_version_serves(
    releases: Path, tmp_path: Path, started: Started, measured: Measured
) -> None:
    folder, away = tmp_path / "served", tmp_path / "away"
    shutil.copytree(releases / "1", folder / "tiny-fm" / "1")
    away.mkdir()
    harms = list(enumerate(damages(releases / "2"), start=2))
    state = ("--state", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    flags = ("--bundles", str(folder), "--admin", "true", "--trials", "never", *state)
    refused = 0
    with (
        started(*flags, "--workers", "2") as (_, url),
        Crowd(url, [Ask(PREDICT, ONE, of_version(1))], clients=3) as crowd,
    ):
        for some in (harms[at : at + AT_ONCE] for at in range(0, len(harms), AT_ONCE)):
            expected = {version: harm(copied(releases, folder, version)) for version, harm in some}
            assert httpx.post(url + LOAD, timeout=120).status_code == 503
            reasons = rejected(url)
            assert reasons.keys() == expected.keys()
            unnamed = {number: reasons[number] for number, name in expected.items() if name not in reasons[number]}
            assert not unnamed
            assert all(reasons.values())
            refused += len(reasons)
            if some[-1] != harms[-1]:
                for version in expected:
                    (folder / "tiny-fm" / str(version)).rename(away / str(version))
        crowd.wait(20)
    assert crowd.failures == []
    for kept in (state, ()):
        with started("--bundles", str(folder), "--trials", "never", *kept) as (_, url):
            assert httpx.get(f"{url}/readyz").status_code == 200
            assert rejected(url).keys() == expected.keys()
            assert of_version(1)(*asked(url)) == ""
    measured("damaged bundles that a live service refused", f"{refused} of {len(harms)}", "100 %")
    measured("  requests that failed meanwhile", f"0 of {crowd.answered:,}", "0")
    assert refused == len(harms) >= 210


def asked(url: str) -> tuple[int, bytes]:
    response = httpx.post(url + PREDICT, content=ONE)
    return response.status_code, response.content


def test_an_undamaged_bundle_is_taken(releases: Path, tmp_path: Path, started: Started, measured: Measured) -> None:
    """The control: the same bundle, sealed in the same way and not damaged, serves; and one that a trial refuses does
    not."""
    folder = tmp_path / "served"
    shutil.copytree(releases / "1", folder / "tiny-fm" / "1")
    with started("--bundles", str(folder), "--admin", "true") as (_, url):
        copied(releases, folder, 2)
        assert httpx.post(url + LOAD, timeout=120).status_code == 200
        taken = of_version(2)(*asked(url)) == ""
        shuffled(copied(releases, folder, 3))
        assert httpx.post(url + LOAD, timeout=120).status_code == 503
        assert is_200(*asked(url)) == ""
    measured("  control: undamaged", "taken" if taken else "refused", "taken")
    assert taken
