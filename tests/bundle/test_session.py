import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from pydantic import ValidationError

import bundle
from bundle import RuntimeRefused
from bundle.device import Provider
from bundle.manifest import Manifest
from bundle.session import Session

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
def test_a_device_that_is_not_there_is_refused(bundles: Path, provider: Provider) -> None:
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what a process maps")
def test_tables_are_mapped_once_for_all_graphs_and_sessions(bundles: Path) -> None:
    weights = bundles / "tiny-fm" / "1" / "weights.bin"
    program = """
import sys, bundle
from bundle.rows import EncodedRows
opened = [bundle.open(sys.argv[1]) for _ in range(2)]
assert opened[0].ranking and opened[1].ranking
print(sum(line.rstrip().endswith("weights.bin") for line in open("/proc/self/maps")))
"""
    said = run(program, weights.parent)
    assert said.stdout.split() == ["1"], said.stderr


def test_a_graph_that_names_no_tables_answers_the_same(bundles: Path) -> None:
    """Bundles written before were silent about them."""
    model = bundle.open(bundles / "tiny-afm" / "1")
    graph, rows = model.manifest.graphs["explain"], model.encoder.rows(model.bundle.golden_rows)
    assert {table.shape for table in graph.tables.values()} == {(model.schema.size, 8)}
    older = Session(model.bundle.path, graph.model_copy(update={"tables": {}})).run(rows)
    for name, expected in model.explanations.run(rows).items():
        np.testing.assert_array_equal(older[name], expected)


def test_what_a_session_reads_is_what_lies_at_the_offset(bundles: Path) -> None:
    model = bundle.open(bundles / "tiny-fm" / "1")
    graph, rows = model.manifest.graphs["score"], model.encoder.rows(model.bundle.golden_rows)
    ((name, table),) = graph.tables.items()
    moved = graph.model_copy(update={"tables": {name: table.model_copy(update={"offset": table.offset + 4})}})
    assert np.abs(Session(model.bundle.path, moved).run(rows)["logit"] - model.logits(rows)).max() > 1e-3


@pytest.mark.parametrize("change", [{"offset": 10**9}, {"file": "../weights.bin"}, {"shape": (10**9, 8)}])
def test_a_table_outside_the_files_of_the_bundle_is_refused(bundles: Path, change: dict[str, object]) -> None:
    manifest = bundle.open(bundles / "tiny-fm" / "1").manifest.model_dump(mode="json")
    (table,) = manifest["graphs"]["score"]["tables"].values()
    table.update(change)
    with pytest.raises(ValidationError, match="a table of the score graph does not lie in a file of the bundle"):
        Manifest.model_validate(manifest, strict=False)
