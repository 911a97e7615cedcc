import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx import Client

from service import runtime
from service.messages import ExplainAnswer, RankAnswer
from service.metrics import Metrics
from service.ranker import best
from service.runtime import CANDIDATES_PER_RUN

CONTEXT = {"user": "u1", "age": 31}
CANDIDATES: list[dict[str, Any]] = [
    {"app": "a1", "tags": ["fun"]},
    {"app": "a2"},
    {"app": "a3", "tags": []},
    {"app": "a2"},
]


def rank(client: Client, model: str = "tiny-fm", **body: object) -> RankAnswer:
    response = client.post(f"/v1/models/{model}:rank", json=body)
    assert response.status_code == 200, response.text
    return RankAnswer.model_validate_json(response.content)


def refused(client: Client, **body: object) -> dict[str, Any]:
    response = client.post("/v1/models/tiny-fm:rank", json=body)
    assert response.status_code == 422
    (refusal,) = response.json()["errors"]
    return dict(refusal)


def test_scores_are_predictions_best_first_and_ties_by_index(client: Client) -> None:
    rows = [CONTEXT | candidate for candidate in CANDIDATES]
    predictions = client.post("/v1/models/tiny-fm:predict", json={"instances": rows}).json()["predictions"]
    answer = rank(client, context=CONTEXT, candidates=CANDIDATES)
    assert [each.score for each in answer.ranked] == pytest.approx(sorted(predictions, reverse=True), abs=1e-6)
    assert [each.index for each in answer.ranked] == sorted(range(4), key=lambda index: (-predictions[index], index))
    assert answer.path == "split"


@pytest.mark.parametrize("candidates", [CANDIDATES, [{"app": "never seen", "tags": ["fun", "unheard of"]}, {}]])
def test_split_and_flat_give_the_same_scores(client: Client, models: list[str], candidates: list[Any]) -> None:
    """A field that changes sides, here age, is all that the flat path needs."""
    on_the_other_side = [{"age": 31, **candidate} for candidate in candidates]
    for model in models:
        split = rank(client, model, context=CONTEXT, candidates=candidates)
        flat = rank(client, model, context={"user": "u1"}, candidates=on_the_other_side)
        assert (split.path, flat.path) == ("split", "flat")
        assert [each.index for each in split.ranked] == [each.index for each in flat.ranked]
        assert [each.score for each in split.ranked] == pytest.approx([each.score for each in flat.ranked], abs=1e-6)
        assert len({each.score for each in split.ranked}) > 1


def test_what_makes_a_ranking_flat_is_said(client: Client) -> None:
    flat = rank(client, context={"user": "u1", "app": "a1"}, candidates=[{"age": 3}, {"tags": ["fun"]}])
    assert (flat.path, flat.misplaced) == ("flat", ["app", "age"])
    assert rank(client, context=CONTEXT, candidates=CANDIDATES).misplaced is None


def test_only_what_the_schema_calls_an_items_is_split(client: Client) -> None:
    for context, candidate, path in (
        ({}, {}, "split"),
        (CONTEXT, {"tags": ["fun"]}, "split"),
        ({"user": "u1", "app": "a1"}, {"tags": ["fun"]}, "flat"),
        ({"user": "u1"}, {"app": "a1", "age": None}, "flat"),
    ):
        assert rank(client, context=context, candidates=[candidate]).path == path


def test_unknown_values_are_counted_for_every_candidate_on_both_paths(client: Client) -> None:
    context, candidate = {"user": "nobody"}, {"app": "nothing", "tags": ["fun", "unheard of"]}
    for extra in ({}, {"age": 3}):
        before = unknown_values(client)
        answer = rank(client, context=context, candidates=[candidate | extra, {"app": "a1"} | extra])
        found = {field: count - before.get(field, 0) for field, count in unknown_values(client).items()}
        assert {field: count for field, count in found.items() if count} == {"user": 2, "app": 1, "tags": 1}
        assert [(each.field, each.candidates) for each in answer.unknown] == [("user", 2), ("app", 1), ("tags", 1)]
    assert rank(client, context=CONTEXT, candidates=CANDIDATES).unknown == []


def unknown_values(client: Client) -> dict[str, float]:
    line = r'factorlens_unknown_values_total\{field="(\w+)",model="tiny-fm"\} (\S+)'
    return {field: float(count) for field, count in re.findall(line, client.get("/metrics").text)}


@pytest.mark.parametrize("extra", [{}, {"age": 31}], ids=["split", "flat"])
def test_the_best_are_explained(client: Client, extra: dict[str, Any]) -> None:
    context, candidates = {"user": "u1"}, [candidate | extra for candidate in CANDIDATES]
    answer = rank(client, context=context, candidates=candidates, explain=2)
    assert answer.path == ("flat" if extra else "split")
    rows = [context | candidates[each.index] for each in answer.ranked[:2]]
    response = client.post("/v1/models/tiny-fm:explain", json={"instances": rows})
    assert answer.explanations == ExplainAnswer.model_validate_json(response.content).explanations
    assert [each.prediction for each in answer.explanations or ()] == pytest.approx(
        [each.score for each in answer.ranked[:2]], abs=1e-6
    )
    columns = {name: [candidate.get(name) for candidate in candidates] for name in ("app", "tags", *extra)}
    assert rank(client, context=context, columns=columns, explain=2).explanations == answer.explanations
    assert len(rank(client, context=context, candidates=candidates, explain=300, top_k=3).explanations or ()) == 3
    assert refused(client, context=context, candidates=candidates, explain=301)["key"] == "explain"
    assert refused(client, context=context, candidates=candidates, explain=0)["key"] == "explain"


def test_any_number_of_candidates_is_taken_in_runs(bundles: Path) -> None:
    loaded = runtime.load(bundles / "tiny-afm" / "1", provider="cpu", threads=1, metrics=Metrics())
    ranking = loaded.ranking
    assert ranking is not None
    candidates = [{"app": f"a{at % 13}", "tags": ["fun", "new"][: at % 3]} for at in range(2 * CANDIDATES_PER_RUN + 7)]
    logits, _ = loaded.rank(ranking.of_context.rows([CONTEXT]), ranking.of_candidate.rows(candidates))
    rows = loaded.encoder.rows([CONTEXT | candidate for candidate in candidates])
    np.testing.assert_allclose(logits, loaded.logits(rows), rtol=0, atol=2e-6)


def test_the_best_of_many_with_ties() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 7, 100):
        logits = draw.integers(0, 5, count).astype(np.float32)
        order = sorted(range(count), key=lambda index: (-logits[index], index))
        for top_k in (1, 2, count // 2 + 1, count, count + 1):
            assert best(logits, top_k).tolist() == order[:top_k]


def test_columns_answer_as_candidates(client: Client) -> None:
    columns = {name: [candidate.get(name) for candidate in CANDIDATES] for name in ("app", "tags")}
    assert rank(client, context=CONTEXT, columns=columns) == rank(client, context=CONTEXT, candidates=CANDIDATES)


def test_top_k(client: Client) -> None:
    whole = rank(client, context=CONTEXT, candidates=CANDIDATES * 5, top_k=10**30).ranked
    assert len(whole) == 20
    assert rank(client, context=CONTEXT, candidates=CANDIDATES * 5, top_k=3).ranked == whole[:3]
    assert rank(client, context=CONTEXT, candidates=CANDIDATES * 5).ranked == whole[:10]


def test_a_field_in_neither_is_missing(client: Client) -> None:
    candidates = [{"app": "a1"}]
    spelt = [{"app": "a1", "tags": None}]
    assert rank(client, context={"user": "u1"}, candidates=candidates) == rank(
        client, context={"user": "u1", "age": None}, candidates=spelt
    )


def test_any_field_may_be_in_the_context(client: Client) -> None:
    context = {"app": "a1", "tags": {"fun": 2, "new": -1}}
    ranked = rank(client, context=context, candidates=[{"user": "u2"}]).ranked
    row = {"instances": [context | {"user": "u2"}]}
    assert ranked[0].score == pytest.approx(
        client.post("/v1/models/tiny-fm:predict", json=row).json()["predictions"][0]
    )


def test_a_field_in_both_is_refused(client: Client) -> None:
    for body in ({"candidates": [{"app": "a1"}, {"user": None}]}, {"columns": {"user": ["u2"]}}):
        refusal = refused(client, context=CONTEXT, **body)
        assert (refusal["key"], refusal["field"]) == ("context", "user")


def test_a_bad_value_is_placed(client: Client) -> None:
    refusal = refused(client, context={"age": "old"}, candidates=CANDIDATES)
    assert (refusal["key"], refusal["field"], refusal.get("instance")) == ("context", "age", None)
    refusal = refused(client, context=CONTEXT, candidates=[*CANDIDATES, {"app": [1]}])
    assert (refusal["field"], refusal["instance"]) == ("app", 4)
    assert "position 1" in refused(client, context={"user": "u1", "hidden": 1}, candidates=CANDIDATES)["received"]


def test_the_number_of_candidates_is_limited(client: Client) -> None:
    assert refused(client, context=CONTEXT, candidates=[{}] * 301)["expected"] == "1 to 300 rows"
    assert refused(client, context=CONTEXT, candidates=[])["received"] == "0 rows"
    assert refused(client, context=CONTEXT, columns={})["received"] == "0 rows"
