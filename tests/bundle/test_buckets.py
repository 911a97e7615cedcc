"""The way to a device, with the CPU in the device's place: padding, buffers that are used again, many threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import bundle
from bundle import buckets
from bundle.buckets import Buckets, size_of, sizes
from bundle.rows import EncodedRows

MODELS = ["tiny-lr", "tiny-fm", "tiny-nfm", "tiny-afm", "tiny-ifm", "ids-only-fm"]


def rows_of(model: bundle.Predictor, count: int) -> EncodedRows:
    golden = model.encoder.rows(model.bundle.golden_rows)
    at = np.random.default_rng(count).integers(len(golden.ids), size=count)
    return EncodedRows(golden.ids[at], golden.values[at])


def on_cpu(model: bundle.Predictor, graph: str, *, limit: int | None = None, recorded: bool = False) -> Buckets:
    session = onnxruntime.InferenceSession(model.bundle.path / model.manifest.graphs[graph].file)
    return Buckets(onnxruntime, session, place=("cpu", 0), limit=limit, recorded=recorded)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (65_536, 65_536)])
def test_a_bucket_is_the_next_power_of_two(rows: int, size: int) -> None:
    assert size_of(rows) == size
    assert sizes(rows)[-1] == size
    assert sizes(rows)[:3] == [1, 2, 4][: len(sizes(rows))]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recorded", [False, True])
def test_padding_changes_no_answer(bundles: Path, name: str, recorded: bool) -> None:
    model = bundle.open(bundles / name / "1")
    for graph, direct in (("score", model.score), ("explain", model.explanations)):
        padded = on_cpu(model, graph, recorded=recorded)
        for count in (64, 3, 1, 5, 37):  # a smaller batch follows a larger one into the same buffers
            rows = rows_of(model, count)
            expected, found = direct.run(rows), padded.run({"ids": rows.ids, "values": rows.values})
            assert set(found) == set(expected)
            for output, answer in expected.items():
                assert found[output].shape == answer.shape, output
                np.testing.assert_allclose(found[output], answer, atol=1e-6, rtol=1e-6, err_msg=output)


def test_a_ranking_goes_through_with_its_state(bundles: Path) -> None:
    model = bundle.open(bundles / "tiny-afm" / "1")
    assert model.ranking
    sides = (model.ranking.of_context, model.ranking.of_candidate)
    raw = [{name: row[name] for name in row if name in sides[1].names} for row in model.bundle.golden_rows]
    context, candidates = sides[0].rows([{}]), sides[1].rows(raw)
    one = EncodedRows(context.ids[:1], context.values[:1])
    state = on_cpu(model, "rank_context").run({"ids": one.ids, "values": one.values})
    found = on_cpu(model, "rank_candidates").run({"ids": candidates.ids, "values": candidates.values, **state})
    expected = model.ranking.logits(model.ranking.state(one), candidates)
    np.testing.assert_allclose(found["logit"], expected, atol=1e-6)


def test_answers_are_copies_and_threads_do_not_mix(bundles: Path) -> None:
    model = bundle.open(bundles / "tiny-fm" / "1")
    padded = on_cpu(model, "score")
    batches = [rows_of(model, count) for count in (5, 6, 7, 8) * 20]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda rows: padded.run({"ids": rows.ids, "values": rows.values})["logit"], batches))
    for rows, logits in zip(batches, found, strict=True):
        np.testing.assert_allclose(logits, model.logits(rows), atol=1e-6)


def test_more_rows_than_the_largest_bucket_are_run_in_turn(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "LARGEST", 16)
    model = bundle.open(bundles / "tiny-afm" / "1")
    rows = rows_of(model, 53)
    found = on_cpu(model, "explain").run({"ids": rows.ids, "values": rows.values})
    for output, answer in model.explanations.run(rows).items():
        assert found[output].shape == answer.shape
        np.testing.assert_allclose(found[output], answer, atol=1e-6)


@pytest.mark.parametrize("bad", [-1, 45, 2**40])
def test_an_id_out_of_range_never_reaches_the_device(bundles: Path, bad: int) -> None:
    """CUDA would answer zeros for it, and wrap a negative one around."""
    model = bundle.open(bundles / "tiny-fm" / "1")
    assert model.schema.size == 45
    rows = rows_of(model, 3)
    rows.ids[1, 2] = bad
    with pytest.raises(ValueError, match="an id is not in 0…44"):
        on_cpu(model, "score", limit=45).run({"ids": rows.ids, "values": rows.values})
    rows.ids[1, 2] = 44
    on_cpu(model, "score", limit=45).run({"ids": rows.ids, "values": rows.values})
