"""The benchmark of a GPU as far as it goes without one: its arithmetic, and its path with the CPU as the device."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.measure import bundles
from bundle import device


def test_what_a_row_needs() -> None:
    assert gpu.row_bytes() == 10 * 8 + 10 * 65 * 4 + 4
    assert gpu.row_flops("fm") == 0
    assert gpu.row_flops("nfm") == 2 * (64 * 64 + 64)
    assert gpu.row_flops("afm") == 2 * 45 * (64 * 16 + 16 + 64) + 2 * 64
    assert gpu.row_flops("ifm") == 2 * (640 * 256 + 256 * 10)


def test_batches_reach_65_536() -> None:
    assert (gpu.BATCHES[0], gpu.BATCHES[-1]) == (1, 65_536)


def test_the_path_with_the_cpu_as_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "bandwidth", lambda place: 1e9)
    monkeypatch.setattr(gpu, "matrix_rate", lambda place: 1e10)
    monkeypatch.setattr(gpu.seconds_of, "__kwdefaults__", {"seconds": 0.0, "runs": 3})
    path = bundles.write(tmp_path, "afm", key="afm", values=20, attention_dim=16)
    (line,) = gpu.measure({"afm": path}, ("cpu", 0), [64])
    assert line["of memory"] == pytest.approx(line["resident"] * gpu.row_bytes() / 1e9)
    assert line["of matrices"] == pytest.approx(line["resident"] * gpu.row_flops("afm") / 1e10)
    assert line["cpu"] > 1000


def test_limits_are_measured_by_operators_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.seconds_of, "__kwdefaults__", {"seconds": 0.0, "runs": 3})
    assert gpu.bandwidth(("cpu", 0), size=2**24) > 1e8
    assert 1e8 < gpu.matrix_rate(("cpu", 0), side=256) < 1e13


@pytest.mark.skipif(device.count() > 0, reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", gpu.NO_GPU + "\n")
