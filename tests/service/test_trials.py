"""New versions are loaded in a process of their own first: one that crashes, hangs or eats memory is refused."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from httpx import Client
from onnx import TensorProto, helper, numpy_helper

from bundle import BundleInvalid
from service import folder, memory, trials
from service.catalog import refused
from service.settings import Settings
from service.trials import Candidate, Verdict

Publish = Callable[[int], Path]
Reseal = Callable[[Path, str, bytes], None]
Serve = Callable[..., Client]
Crashing = Callable[[int], Path]


def reasons(client: Client) -> dict[int, str]:
    rejected = client.get("/v1/models/tiny-fm").json()["rejected"]
    return {each["version"]: each["reason"] for each in rejected}


def verdicts(root: Path, room: int | None = None, **more: object) -> list[Verdict]:
    settings = Settings.model_validate({"bundles": root, "provider": "cpu", **more})
    found = [Candidate("tiny-fm", version, digest) for version, digest in folder.versions(root, "tiny-fm").items()]
    return asyncio.run(trials.run(settings, found, room))


def test_a_version_that_crashes_takes_nothing_along(
    publish: Publish, serve: Serve, crashing: Crashing, caplog: pytest.LogCaptureFixture
) -> None:
    for version in (1, 2, 3):
        publish(version)
    tried = crashing(2)
    client = serve(trials="always", versions=3, admin=True)
    crashed = "it was tried in a process of its own, which was ended by SIGABRT"
    assert (client.get("/v1/models/tiny-fm").json()["versions"], reasons(client)) == ([3, 1], {2: crashed})
    said = [vars(record)["facts"]["said"] for record in caplog.records if record.getMessage() == "rejected"]
    assert ["Aborted" in each for each in said] == [True]  # Python's own words at its end
    lines = tried.read_text().split()
    assert lines == ["tiny-fm/3", "tiny-fm/2", "tiny-fm/1"]  # those after it were tried by another process
    assert client.post("/v1/admin/models/tiny-fm:load").status_code == 200
    assert tried.read_text().split() == lines


def add(path: Path, *nodes: onnx.NodeProto, **constants: np.ndarray) -> bytes:
    """The score graph with more nodes before the last; `added`, which they make, is added to the logit."""
    model = onnx.load(path / "score.onnx", load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["plain_logit" if name == "logit" else name for name in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    model.graph.node.extend([*nodes, helper.make_node("Add", ["plain_logit", "added"], ["logit"])])
    return bytes(model.SerializeToString())


def test_a_version_that_eats_memory_is_refused(publish: Publish, reseal: Reseal, tmp_path: Path) -> None:
    """Its graph asks for 4 GB; 1 GB is free."""
    path = publish(1)
    sizes, of_zeros = np.array([2**30], np.int64), helper.make_tensor("value", TensorProto.FLOAT, [1], [0])
    nodes = (
        helper.make_node("ConstantOfShape", ["sizes"], ["large"], value=of_zeros),
        helper.make_node("Add", ["large", "zero"], ["larger"]),
        helper.make_node("ReduceMax", ["larger"], ["added"], keepdims=0),
    )
    large = add(path, *nodes, sizes=sizes, zero=np.zeros(1, np.float32))
    reseal(path, "score.onnx", large)
    (verdict,) = verdicts(tmp_path, room=2**30)
    assert verdict.refused
    assert verdict.refused.reason.startswith("onnxruntime cannot")


def test_a_version_that_never_ends_is_refused(
    publish: Publish, reseal: Reseal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph counts to 2^40."""
    path = publish(1)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["sum"], ["sum_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("at", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_on", TensorProto.FLOAT, []),
        ],
    )
    loop = helper.make_node("Loop", ["times", "yes", "start"], ["added"], body=body)
    endless = add(path, loop, times=np.array(2**40), yes=np.array(True), start=np.array(0, np.float32))
    reseal(path, "score.onnx", endless)
    monkeypatch.setattr(trials, "SECONDS", 5.0)
    (verdict,) = verdicts(tmp_path)
    assert verdict.refused
    assert "its own, which took longer than 5 seconds" in verdict.refused.reason or "SIGXCPU" in verdict.refused.reason
    assert verdict.refused.passing


def test_good_and_refused_ones_share_a_process(publish: Publish, tmp_path: Path) -> None:
    publish(1)
    (publish(2) / "report.json").unlink()
    publish(3)
    third, second, first = verdicts(tmp_path)
    assert (first.refused, third.refused) == (None, None)
    assert third.grown > 10**5  # the first one that is tried
    assert second.refused
    assert (second.refused.reason, second.refused.passing) == ("report.json is missing", False)
    assert second.refused.digest == folder.digest(tmp_path / "tiny-fm" / "2")


def test_a_trial_that_cannot_start_is_no_verdict_on_a_bundle(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(1)
    site = tmp_path / ".site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import os, sys\nif 'service.trial' in sys.orig_argv: os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{Path.cwd()}")
    (verdict,) = verdicts(tmp_path)
    assert verdict.refused
    assert verdict.refused.passing
    assert verdict.refused.reason == "no process could be started to try it: it ended with exit code 3"


def test_what_memory_or_time_cut_short_is_no_verdict_on_a_bundle() -> None:
    ample = 10**9 + 500 * 10**6
    endings = ("was ended by SIGKILL", "was ended by SIGXCPU", "took longer than 300 seconds", "was ended by SIGSEGV")
    assert [trials._may_pass(ended, 1, None) for ended in endings] == [True, True, True, False]
    assert [trials._may_pass("was ended by SIGABRT", 10**9 // 4, room) for room in (None, ample, ample - 1)] == [
        *(False, False, True)
    ]
    short = BundleInvalid(Path("1"), "vocabulary.npz: ")
    short.__cause__ = MemoryError()
    assert [refused(each, "d", "cpu").passing for each in (MemoryError(), short)] == [True, True]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts texts in the place of /proc and /sys/fs/cgroup: 8 GB are available, and no control group limits."""
    proc, cgroups = tmp_path / ".proc", tmp_path / ".cgroup"
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUPS", cgroups)

    def put(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    put(".proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable:  8000000 kB\n")
    put(".proc/self/cgroup", "0::/\n")
    return put


def test_the_room_is_the_least_that_any_limit_leaves(machine: Callable[[str, str], None]) -> None:
    available = 8_000_000 * 1024
    assert memory.room() == available
    machine(".proc/self/cgroup", "0::/pods/one\n")
    for group, most, used, cache in (("pods", "max", 10, 0), ("pods/one", "3000", 2500, 700)):
        machine(f".cgroup/{group}/memory.max", f"{most}\n")
        machine(f".cgroup/{group}/memory.current", f"{used}\n")
        machine(f".cgroup/{group}/memory.stat", f"anon 5\ninactive_file {cache}\n")
    assert memory.room() == 3000 - (2500 - 700)
    machine(".cgroup/pods/memory.max", "1100\n")
    machine(".cgroup/pods/memory.current", "1000\n")
    assert memory.room() == 100
    machine(".cgroup/pods/memory.current", "1200\n")
    assert memory.room() == 0


def test_version_1_of_control_groups_counts_too(machine: Callable[[str, str], None]) -> None:
    machine(".proc/self/cgroup", "11:cpu,cpuacct:/x\n4:memory:/docker/one\n0::/\n")
    machine(".cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    machine(".cgroup/memory/memory.usage_in_bytes", "5\n")
    assert memory.room() == 8_000_000 * 1024
    machine(".cgroup/memory/docker/one/memory.limit_in_bytes", "5000\n")
    machine(".cgroup/memory/docker/one/memory.usage_in_bytes", "4000\n")
    machine(".cgroup/memory/docker/one/memory.stat", "inactive_file 1\ntotal_inactive_file 500\n")
    assert memory.room() == 1500


def test_what_cannot_be_told_is_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path / "none")
    assert (memory.room(), memory.resident_bytes(os.getpid())) == (None, 0)


def test_a_load_for_which_there_is_no_room_is_refused_until_there_is(
    publish: Publish, serve: Serve, machine: Callable[[str, str], None]
) -> None:
    publish(1)
    client = serve(trials="later", admin=True)
    publish(2)
    for free, said in ((1000, "needs about 0 MB of memory, and 0 MB are free"), (700_000, "and 1 MB are free")):
        machine(".cgroup/memory.max", f"{free}\n")
        machine(".cgroup/memory.current", "0\n")
        refused = client.post("/v1/admin/models/tiny-fm:load")
        assert refused.status_code == 503
        assert (
            "version 2 of tiny-fm was refused: there is no room for it beside what serves" in refused.json()["detail"]
        )
        assert said in refused.json()["detail"]
        assert client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]}).json()["version"] == 1
    machine(".cgroup/memory.max", "max\n")
    assert client.post("/v1/admin/models/tiny-fm:load").json()["default"] == 2
    machine(".cgroup/memory.max", "700000\n")
    assert client.post("/v1/admin/models/tiny-fm:reload").status_code == 503  # both at once
    assert json.loads(client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]}).content)["version"] == 2
