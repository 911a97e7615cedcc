from typing import Any

import pytest
from httpx import Client

from service.messages import RankAnswer

CONTEXT = {"user": "u1", "age": 31}
CANDIDATES: list[dict[str, Any]] = [
    {"app": "a1", "tags": ["fun"]},
    {"app": "a2"},
    {"app": "a3", "tags": []},
    {"app": "a2"},
]


def rank(client: Client, **body: object) -> RankAnswer:
    response = client.post("/v1/models/tiny-fm:rank", json=body)
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
    assert answer.path == "flat"


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
    spelt = [{"app": "a1", "tags": None, "age": None}]
    assert rank(client, context={"user": "u1"}, candidates=candidates) == rank(
        client, context={"user": "u1"}, candidates=spelt
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


def test_candidate_sets_are_not_kept_yet(client: Client) -> None:
    assert "candidate_set" in refused(client, context=CONTEXT, candidate_set="apps")["received"]


def test_the_number_of_candidates_is_limited(client: Client) -> None:
    assert refused(client, context=CONTEXT, candidates=[{}] * 301)["expected"] == "1 to 300 rows"
    assert refused(client, context=CONTEXT, candidates=[])["received"] == "0 rows"
    assert refused(client, context=CONTEXT, columns={})["received"] == "0 rows"
