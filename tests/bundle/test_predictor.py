import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import bundle
from bundle import BundleInvalid, InputError, Predictor
from bundle.explanation import RowExplanation, explain
from bundle.manifest import RANK_GRAPHS, ROW_GRAPHS
from bundle.rows import Row

MODELS = ["lr", "fm", "nfm", "afm", "ifm"]
ROWS: list[Row] = [
    {"user": "u1", "app": "a1", "tags": ["fun", "été"], "age": 31},
    {"user": "nobody", "app": 3, "tags": {"new": 0.5, "unseen": -2}, "age": 250},
    {"app": "a2", "tags": []},
    {},
]


@pytest.fixture(scope="module", params=MODELS)
def model(bundles: Path, request: pytest.FixtureRequest) -> Predictor:
    return bundle.open(bundles / f"tiny-{request.param}" / "1")


def total(row: RowExplanation) -> float:
    fields, pairs = sum(term.contribution for term in row.fields), sum(term.contribution for term in row.pairs)
    return row.bias + fields + pairs + row.remaining_contribution + row.residual


def size_of_terms(row: RowExplanation) -> float:
    fields, pairs = (sum(abs(term.contribution) for term in terms) for terms in (row.fields, row.pairs))
    return fields + pairs + abs(row.residual)


@pytest.mark.parametrize("top_k", [0, 2, 100])
def test_terms_add_up_to_the_logit_and_the_logit_to_the_prediction(model: Predictor, top_k: int) -> None:
    rows, whole = model.explain(ROWS, top_k=top_k), model.explain(ROWS, top_k=100)
    assert [row.logit for row in rows] == model.logits(model.encoder.rows(ROWS)).tolist()
    assert [row.prediction for row in rows] == model.predict(ROWS).tolist()
    for row, scale in zip(rows, map(size_of_terms, whole), strict=True):
        assert row.prediction == pytest.approx(1 / (1 + np.exp(-row.logit)), abs=1e-12)
        assert abs(total(row) - row.logit) <= 1e-6 * (1 + scale)
        assert row.completeness_error == pytest.approx(abs(total(row) - row.logit), abs=1e-12)
    assert all(row.exact for row in rows) == (not any(row.residual for row in rows)) == (model.manifest.key != "nfm")


def test_every_field_is_there_in_schema_order_with_its_sizes(model: Predictor) -> None:
    axes = {"afm": ("pair", "attention"), "ifm": ("field", "factor")}
    axis, name = axes.get(model.manifest.key, (None, None))
    for row in model.explain(ROWS):
        assert [term.field for term in row.fields] == ["user", "app", "tags", "age"]
        assert all(set(term.sizes) == ({name} if axis == "field" else set()) for term in row.fields)
        assert all(set(term.sizes) == ({name} if axis == "pair" else set()) for term in row.pairs)
    assert [[t.field for t in row.fields if not t.known] for row in model.explain(ROWS)] == [
        [],
        ["user", "app", "tags"],
        [],
        [],
    ]


def test_values_of_a_multi_valued_field_add_up_to_the_field(model: Predictor) -> None:
    values = []
    for row in model.explain(ROWS):
        tags = row.fields[2]
        assert tags.values is not None
        assert sum(value.contribution for value in tags.values) == pytest.approx(tags.contribution, abs=1e-6)
        assert [term.values for term in row.fields if term is not tags] == [None] * 3
        values.append([value.value for value in tags.values])
    assert values == [["fun", "été"], ["new", "unseen"], [None], [None]]


def test_the_strongest_pairs_are_named_and_the_others_summed(bundles: Path) -> None:
    model = bundle.open(bundles / "tiny-fm" / "1")
    for all_, few in zip(model.explain(ROWS, top_k=6), model.explain(ROWS, top_k=2), strict=True):
        strengths = [abs(pair.contribution) for pair in all_.pairs]
        assert strengths == sorted(strengths, reverse=True)
        assert few.pairs == all_.pairs[:2]
        assert (few.remaining_count, all_.remaining_count) == (4, 6 - len(all_.pairs))
        rest = sum(pair.contribution for pair in all_.pairs[2:])
        assert few.remaining_contribution == pytest.approx(rest, abs=1e-9)
    assert {pair.fields for pair in model.explain(ROWS[:1], top_k=6)[0].pairs} == {
        ("user", "app"),
        ("user", "tags"),
        ("user", "age"),
        ("app", "tags"),
        ("app", "age"),
        ("tags", "age"),
    }


def test_pairs_that_only_have_a_size_are_shown_by_it(bundles: Path) -> None:
    model = bundle.open(bundles / "tiny-afm" / "1")
    encoded = model.encoder.rows(ROWS[:1])
    (row,), names = model.explain(ROWS[:1], top_k=6), model.schema.names
    attention = np.array([[0.1, 0.0, 0.4, 0.2, 0.2, 0.1]], np.float32)
    arrays = {
        "bias": np.float32(0),
        "field": np.zeros((1, 4), np.float32),
        "slot": np.zeros(encoded.ids.shape, np.float32),
        "pair": np.zeros((1, 6), np.float32),
        "residual": np.array([row.logit], np.float32),
        "attention": attention,
    }
    logits = np.array([row.logit], np.float32)
    (shown,) = explain(model.bundle, ROWS[:1], encoded, logits, arrays, top_k=3)
    assert [pair.fields for pair in shown.pairs] == [
        (names[f], names[g]) for f, g in (model.schema.pairs[p] for p in (2, 3, 4))
    ]
    assert [pair.sizes["attention"] for pair in shown.pairs] == pytest.approx([0.4, 0.2, 0.2])
    assert (shown.remaining_count, shown.remaining_contribution) == (3, 0)


def test_a_row_alone_gets_the_answer_it_gets_among_many(model: Predictor) -> None:
    rows = (model.bundle.golden_rows + ROWS) * 3
    together = model.explain(rows, top_k=100)
    for row, among_many in zip(rows, together, strict=True):
        (alone,) = model.explain([row])
        assert abs(alone.logit - among_many.logit) <= 1e-6 * (1 + size_of_terms(among_many))


def test_what_truncation_leaves_out_is_not_looked_at(tiny: Path, reseal: Callable[[], Path]) -> None:
    schema = json.loads((tiny / "schema.json").read_bytes())
    schema["fields"][2]["kind"]["truncate"] = True
    (tiny / "schema.json").write_text(json.dumps(schema))
    (row,) = bundle.open(reseal()).explain([{"tags": ["fun", "new", "old", 0.5]}])
    assert [value.value for value in row.fields[2].values or ()] == ["fun", "new", "old"]


def test_a_refused_row_is_named(bundles: Path) -> None:
    model = bundle.open(str(bundles / "tiny-fm" / "1"))
    for answer in (model.predict, model.explain):
        with pytest.raises(InputError, match="field 'age', row 1: expected a finite number or null, received a string"):
            answer([{}, {"age": "31"}])


def test_no_rows(model: Predictor) -> None:
    assert model.predict([]).shape == (0,)
    assert model.explain([]) == []


def test_replay_refuses_weights_that_were_changed_and_signed_again(tiny: Path, reseal: Callable[[], Path]) -> None:
    weights = np.fromfile(tiny / "weights.bin", np.float32)
    (weights * np.float32(1.01)).tofile(tiny / "weights.bin")
    with pytest.raises(BundleInvalid, match="replaying the golden rows gave another logit"):
        bundle.open(reseal())


@pytest.mark.parametrize(("name", "inputs"), [("ids-only-fm", ["ids"]), ("tiny-fm", ["ids", "values"])])
def test_graphs_take_values_only_where_a_field_needs_them(bundles: Path, name: str, inputs: list[str]) -> None:
    model = bundle.open(bundles / name / "1")
    assert model.schema.needs_values == ("values" in inputs)
    for graph in (model.manifest.graphs[each] for each in ROW_GRAPHS):
        loaded = onnx.load(model.bundle.path / graph.file, load_external_data=False)
        assert [each.name for each in loaded.graph.input] == list(graph.inputs) == inputs
    assert np.all(np.isfinite(model.predict([{"user": "u1", "app": "a1"}, {}])))


def test_a_ranking_computes_the_context_once(model: Predictor) -> None:
    ranking, candidates = model.ranking, [{"app": f"a{at}", "tags": ["fun", "old"][: at % 3]} for at in range(5)] + [{}]
    assert ranking is not None
    for context in ({"user": "u1", "age": 31}, {"user": "nobody"}, {}):
        state = ranking.state(ranking.of_context.rows([context]))
        logits = ranking.logits(state, ranking.of_candidate.rows(candidates))
        rows = [context | candidate for candidate in candidates]
        terms = map(size_of_terms, model.explain(rows, top_k=100))
        for logit, flat, scale in zip(logits, model.logits(model.encoder.rows(rows)), terms, strict=True):
            assert abs(logit - flat) <= 1e-6 * (1 + scale)


def test_a_ranking_of_other_logits_is_refused(tiny: Path, reseal: Callable[[], Path]) -> None:
    path = tiny / "rank_candidates.onnx"
    graph = onnx.load(path, load_external_data=False)
    last = graph.graph.node[-1]
    assert list(last.output) == ["logit"]
    last.output[0] = "other"
    graph.graph.node.append(onnx.helper.make_node("Neg", ["other"], ["logit"]))
    onnx.save(graph, path)
    with pytest.raises(BundleInvalid, match="ranking the golden rows gave other logits than scoring them"):
        bundle.open(reseal())


def test_a_bundle_without_a_ranking_is_opened(tiny: Path, reseal: Callable[[], Path]) -> None:
    manifest = json.loads((tiny / "manifest.json").read_bytes())
    for name in RANK_GRAPHS:
        file = manifest["graphs"].pop(name)["file"]
        del manifest["files"][file]
        (tiny / file).unlink()
    (tiny / "manifest.json").write_text(json.dumps(manifest))
    assert bundle.open(reseal()).ranking is None


def test_an_encoder_of_some_fields_gives_their_slots(model: Predictor) -> None:
    whole = model.encoder.rows(ROWS)
    some = model.encoder.only(["age", "tags"])
    rows = [{name: row[name] for name in ("tags", "age") if name in row} for row in ROWS]
    encoded = some.rows(rows)
    assert some.names == ("tags", "age")
    np.testing.assert_array_equal(encoded.ids, whole.ids[:, 2:])
    np.testing.assert_array_equal(encoded.values, whole.values[:, 2:])
    np.testing.assert_array_equal(some.unknown(encoded.ids), model.encoder.unknown(whole.ids)[:, 2:])
    with pytest.raises(InputError, match="only the fields tags, age"):
        some.rows([{"user": "u1"}])
