import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

import bundle
from bundle import RuntimeRefused

cpu_only = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime can run on CUDA"
)

REPORTS_THE_IMPORT = """
import os, sys
import bundle
print("onnxruntime" in sys.modules)
sys.addaudithook(lambda event, arguments: event == "import" and arguments[0] == "onnxruntime" and print(
    os.environ.get("ORT_DISABLE_TELEMETRY")))
bundle.open(sys.argv[1])
print("onnxruntime" in sys.modules)
"""


def run(program: str, *arguments: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@cpu_only
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_device_that_is_not_there_is_refused(bundles: Path, provider: bundle.session.Provider) -> None:
    with pytest.raises(RuntimeRefused) as caught:
        bundle.open(bundles / "tiny-fm" / "1", provider=provider)
    assert str(caught.value).startswith(f"{provider} cannot run here: the installed onnxruntime has no ")
    assert "install the extra 'gpu' (onnxruntime-gpu) in place of 'cpu'" in str(caught.value)


@cpu_only
def test_auto_says_what_it_chose_and_why(bundles: Path) -> None:
    opened = bundle.open(bundles / "tiny-fm" / "1", provider="auto")
    for session in (opened.score, opened.explanations):
        assert session.chosen == "cpu"
        assert "has no CUDAExecutionProvider" in session.why


def test_a_provider_that_was_asked_for_is_what_runs(bundles: Path) -> None:
    session = bundle.open(bundles / "tiny-fm" / "1", provider="cpu").score
    assert (session.chosen, session.why) == ("cpu", "provider = cpu")


def test_both_distributions_installed_are_refused(bundles: Path, tmp_path: Path) -> None:
    other = tmp_path / "onnxruntime_gpu-1.0.dist-info" / "METADATA"
    other.parent.mkdir()
    other.write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n")
    program = "import bundle, sys; bundle.open(sys.argv[1])"
    refused = run(program, bundles / "tiny-fm" / "1", path=tmp_path)
    assert "RuntimeRefused: onnxruntime and onnxruntime-gpu are both installed" in refused.stderr
    assert "uninstall both" in refused.stderr


def test_onnxruntime_is_imported_lazily_and_without_telemetry(bundles: Path) -> None:
    reported = run(REPORTS_THE_IMPORT, bundles / "tiny-fm" / "1")
    assert reported.stdout.split() == ["False", "1", "True"], reported.stderr
