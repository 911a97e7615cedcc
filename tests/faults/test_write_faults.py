"""A fault at the N-th fsync, rename or write of a training with its checkpoints and its export, for every N.

strace injects it into the real process. After each the state on disk is looked at, and the run is resumed: it has to
end in the same weights as an undisturbed one, and the version that was there before has to open all the while.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

import bundle
from bundle import BundleInvalid, store
from tests.faults.conftest import EPOCHS, Measured, Nursery
from training import checkpoint

pytestmark = pytest.mark.slow
MOST = 200  # calls of a kind that a training makes, or fewer
WRITES = ("write", "writev", "pwrite64")
NAMES = ("rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir")
SEEN = ",".join(("fsync", "fdatasync", "openat", *WRITES, *NAMES))
FAULTS = {
    "kill -9 at the N-th fsync": (("fsync",), "signal=KILL"),
    "kill -9 at the N-th write": (WRITES, "signal=KILL"),
    "kill -9 at the N-th rename, link or removal": (NAMES, "signal=KILL"),
    "no space left at the N-th write": (WRITES, "error=ENOSPC"),
    "an error of the disk at the N-th fsync": (("fsync",), "error=EIO"),
}


@pytest.fixture(scope="module")
def strace(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = shutil.which("strace")
    if not found or subprocess.run([found, "-o", "/dev/null", "true"], check=False).returncode:
        pytest.skip("strace is not here, or may not trace")
    return found


@pytest.fixture(scope="module")
def before(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with version 1, as an undisturbed run left it."""
    folder = tmp_path_factory.mktemp("before")
    assert nursery.fit(folder) == 0
    return folder


def traced(nursery: Nursery, strace: str, folder: Path, *given: str, spoil: str = "") -> tuple[int, list[str]]:
    """Train in `folder` under strace with these options; the exit code and what strace wrote."""
    child = nursery.child(folder, spoil=spoil)
    log = folder / "trace"
    command = [strace, "-f", "-y", "-o", str(log), "-p", str(child.pid), *given]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr
        assert "attached" in tracer.stderr.readline()
        child.go()
        code = child.wait()
        tracer.wait(30)
    return code, log.read_text().splitlines()


def broken(folder: Path) -> list[str]:
    """What is wrong with the state on disk: versions that do not open, or a checkpoint that cannot be read."""
    wrong = [] if 1 in (found := store.versions(folder / "artifacts", "m")) else ["version 1 is gone"]
    for version in found:
        try:
            bundle.open(folder / "artifacts" / "m" / str(version))
        except BundleInvalid as error:
            wrong.append(error.reason)
    saved = None
    try:
        saved = checkpoint.load(folder / "checkpoints" / "m")
        for part in ("model", "optimizer", "best") if saved else ():
            saved.read(part)
    except Exception as error:
        wrong.append(f"checkpoint: {error!r}")
    kept = saved.progress.epoch if saved else 0
    began = len(re.findall(r"^epoch \d+/", (folder / "said").read_text(), re.MULTILINE))
    if kept < began - 1 and len(found) == 1:
        wrong.append(f"{began} epochs were trained, {kept} kept")
    return wrong


def weights(folder: Path) -> str:
    newest = max(store.versions(folder / "artifacts", "m"))
    return sha256((folder / "artifacts" / "m" / str(newest) / "weights.bin").read_bytes()).hexdigest()


def sweep(
    nursery: Nursery, strace: str, before: Path, place: Path, fault: str, *, spoil: str = ""
) -> Iterator[list[str]]:
    """For each N that the run comes to: what was wrong after the fault or after the run was resumed."""
    ended: set[str] = set()
    calls, what = FAULTS[fault]
    for call, at in ((call, at) for call in calls for at in range(1, MOST)):  # strace counts each call by itself
        if call in ended:
            continue
        folder = place / f"{call}-{at}"
        shutil.copytree(before / "artifacts", folder / "artifacts")
        inject = f"inject={call}:{what}:when={at}"
        code, log = traced(nursery, strace, folder, "-e", f"trace={call}", "-e", inject, spoil=spoil)
        if code == 0 and not any("INJECTED" in line for line in log):
            ended.add(call)
            continue
        wrong = broken(folder)
        if "error" in what:
            wrong += [] if code in (0, 1) and "Traceback" not in (folder / "said").read_text() else ["a traceback"]
        wrong += ["not resumed"] if nursery.fit(folder, "--resume", spoil=spoil) else []
        wrong += ["other weights"] if not wrong and weights(folder) != weights(before) else []
        yield [f"{call} {at}: {each}" for each in wrong]
        shutil.rmtree(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_a_valid_version(
    fault: str, nursery: Nursery, measured: Measured, strace: str, before: Path, tmp_path: Path
) -> None:
    found = list(sweep(nursery, strace, before, tmp_path, fault))
    wrong = [each for some in found for each in some]
    measured(f"{fault}: states without a valid version", f"{len(wrong)} of {len(found)}", "0")
    assert wrong == []
    assert len(found) > 15


def test_a_version_that_is_not_renamed_is_seen(
    nursery: Nursery, measured: Measured, strace: str, before: Path, tmp_path: Path
) -> None:
    """The control: folders that are copied to their names, and not renamed, are seen half done."""
    found = sweep(nursery, strace, before, tmp_path, "kill -9 at the N-th rename, link or removal", spoil="not renamed")
    seen = next((wrong for wrong in found if wrong), [])
    measured("  control: copied to its name, not renamed", "seen" if seen else "not seen", "seen")
    assert seen


CALL = re.compile(r"\d+ +(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
PUBLISHED = re.compile(r"/(?:m/\d+|m/epoch-\d+)$")


def too_early(log: list[str], folder: Path) -> tuple[int, list[str]]:
    """How many folders were renamed to their names, and which before all in them, or they, were on the disk.

    kill -9 takes nothing from a disk, and a power cut does: whatever was written to a file or created in a folder has
    to be followed by an fsync of it before the rename, and the rename by one of the parent before anything is removed.
    """
    dirty: set[str] = set()
    renamed, unsynced, wrong = 0, "", []
    for call in filter(None, map(CALL.match, log)):
        name, given = call["name"], call["arguments"]
        if call["result"].startswith("-"):
            continue
        paths = [str((folder / path).resolve()) for path in re.findall(r'"([^"]*)"', given)]
        opened = next(iter(re.findall(r"^\d+<([^>]*)>", given)), "")
        if name in ("write", "writev", "pwrite64"):
            dirty.add(opened)
        elif name == "openat" and "O_CREAT" in given:
            dirty |= {paths[-1], str(Path(paths[-1]).parent)}
        elif name in ("fsync", "fdatasync"):
            dirty.discard(opened)
            unsynced = "" if opened == unsynced else unsynced
        elif name in ("link", "linkat"):
            dirty.add(str(Path(paths[-1]).parent))
        elif name.startswith("rename"):
            old, new = paths[0], paths[-1]
            if PUBLISHED.search(new):
                renamed += 1
                wrong += [f"{new}: {path}" for path in dirty if path.startswith(old)]
                unsynced = str(Path(new).parent)
            dirty = {new + path.removeprefix(old) if path.startswith(old) else path for path in dirty}
        elif name in ("unlink", "unlinkat", "rmdir") and unsynced:
            wrong.append(f"{paths[0]} was removed before {unsynced} was synced")
            unsynced = ""
    return renamed, [*wrong, *([unsynced] if unsynced else [])]


@pytest.mark.parametrize("spoil", ["", "never synced"])
def test_nothing_has_its_name_before_it_is_on_the_disk(
    spoil: str, nursery: Nursery, measured: Measured, strace: str, tmp_path: Path
) -> None:
    code, log = traced(nursery, strace, tmp_path, "-e", f"trace={SEEN}", spoil=spoil)
    renamed, wrong = too_early(log, tmp_path)
    assert (code, renamed) == (0, EPOCHS + 1)
    if spoil:
        measured("  control: nothing is fsynced", "seen" if wrong else "not seen", "seen")
        assert wrong
    else:
        measured("renamed before all of it was fsynced", f"{len(wrong)} of {renamed} folders", "0")
        assert wrong == []
