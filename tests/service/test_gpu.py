"""The service as it runs on a GPU, with the CPU in the GPU's place: buckets, a runner thread, checked ids, metrics."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from httpx import Client

import bundle
from bundle import RuntimeRefused, device
from bundle.buckets import Buckets
from bundle.device import Gpu
from service import runtime
from service.metrics import Metrics


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "providers", lambda provider, gpu: [("CPUExecutionProvider", {})])
    monkeypatch.setattr(device, "place", lambda gpu: ("cpu", 0))
    monkeypatch.setattr(device, "memory", lambda number: {"used": 7 + number, "total": 16})
    monkeypatch.setattr(runtime, "GPU_ROWS_PER_RUN", (256, 512))


@pytest.fixture
def client(as_gpu: None, bundles: Path, serve: Callable[..., Client]) -> Client:
    return serve(bundles=bundles, provider="cuda", device=1)


def test_every_endpoint_answers_as_on_the_cpu(client: Client, bundles: Path) -> None:
    for name in ("tiny-fm", "tiny-afm", "ids-only-fm"):
        described = client.get(f"/v1/models/{name}").json()
        assert described["provider"] == "cuda"
        on_cpu = bundle.open(bundles / name / "1")
        rows = on_cpu.bundle.golden_rows[:37]
        answered = client.post(f"/v1/models/{name}:predict", json={"instances": rows}).json()
        np.testing.assert_allclose(answered["predictions"], on_cpu.predict(rows), atol=1e-6)
        explained = client.post(f"/v1/models/{name}:explain", json={"instances": rows[:3]}).json()
        assert [each["completeness_error"] < 1e-5 for each in explained["explanations"]] == [True] * 3
    metrics = client.get("/metrics").text
    assert 'factorlens_device_memory_bytes{device="1",kind="used"} 8.0' in metrics


def test_a_runtime_on_a_gpu_batches_greedily_in_large_runs(as_gpu: None, bundles: Path) -> None:
    loaded = runtime.load(bundles / "tiny-fm" / "1", provider="cuda", threads=1, metrics=Metrics())
    assert not loaded.batcher.inline
    assert loaded.rows_per_run in (256, 512)
    assert loaded.batcher.rows == loaded.rows_per_run


def test_whatever_runs_on_a_gpu_has_its_ids_checked(
    as_gpu: None, bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each graph of a bundle, and every run of it goes by the check: nothing else holds the session."""
    runs: list[int | None] = []
    run = Buckets.run
    monkeypatch.setattr(Buckets, "run", lambda self, given: (runs.append(self._limit), run(self, given))[1])
    model = bundle.open(bundles / "tiny-fm" / "1", provider="cuda", gpu=Gpu())
    assert len(runs) > 10  # golden rows were replayed and ranked
    assert set(runs) == {model.schema.size}
    rows = model.encoder.rows(model.bundle.golden_rows[:2])
    rows.ids[0, 0] = model.schema.size
    assert model.ranking
    for act in (model.logits, model.explanations.run, model.score.run):
        with pytest.raises(RuntimeRefused, match=f"an id is not in 0…{model.schema.size - 1}"):
            act(rows)
    context = model.ranking.of_context.rows([{}])
    context.ids[0, 0] = -1
    with pytest.raises(RuntimeRefused, match="an id is not in 0"):
        model.ranking.state(context)
