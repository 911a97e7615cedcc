"""A bundle of task = ranking behind the same addresses as any other: its prediction is the logit."""

import pytest
from httpx import Client

from service.messages import ExplainAnswer, PredictAnswer, RankAnswer

CONTEXT = {"user": "u1", "age": 31}
CANDIDATES = [{"app": f"a{app}", "tags": tags} for app in range(12) for tags in (["fun"], ["new", "old"])]
ROWS = [CONTEXT | candidate for candidate in CANDIDATES]
MODEL = "/v1/models/tiny-ranking"


@pytest.fixture(scope="module")
def scored(ranking: Client) -> PredictAnswer:
    response = ranking.post(f"{MODEL}:predict", json={"instances": ROWS, "logits": True})
    return PredictAnswer.model_validate_json(response.content)


def test_predictions_are_logits(scored: PredictAnswer) -> None:
    assert scored.predictions == scored.logits
    assert min(scored.predictions) < 0 < max(scored.predictions), "no probability could be told from a logit"


def test_candidates_are_ranked_by_logit(ranking: Client, scored: PredictAnswer) -> None:
    body = {"context": CONTEXT, "candidates": CANDIDATES, "top_k": len(CANDIDATES)}
    answer = RankAnswer.model_validate_json(ranking.post(f"{MODEL}:rank", json=body).content)
    order = sorted(range(len(ROWS)), key=lambda index: (-scored.predictions[index], index))
    assert [each.index for each in answer.ranked] == order
    assert [each.score for each in answer.ranked] == pytest.approx(
        [scored.predictions[index] for index in order], abs=1e-6
    )


def test_an_explanation_adds_up_to_the_logit(ranking: Client, scored: PredictAnswer) -> None:
    response = ranking.post(f"{MODEL}:explain", json={"instances": ROWS, "top_k": 2})
    for each, logit in zip(
        ExplainAnswer.model_validate_json(response.content).explanations, scored.logits or [], strict=True
    ):
        parts = [each.bias, *(field.contribution for field in each.fields), *(pair.contribution for pair in each.pairs)]
        assert sum(parts) + each.remaining.contribution + each.residual == pytest.approx(logit, abs=1e-5)
        assert (each.prediction, each.link, each.exact) == (each.logit, "identity", True)


def test_the_model_says_that_it_ranks_and_how_well(ranking: Client) -> None:
    described = ranking.get(MODEL).json()
    assert (described["task"], described["link"]) == ("ranking", "identity")
    assert described["metrics"].keys() == {"ndcg@10", "hr@10", "mrr", "gauc"}
    sources = {field["name"]: field["source"] for field in described["fields"]}
    assert sources == {"user": "user", "app": "item", "tags": "item", "age": "user"}
    assert ranking.post(f"{MODEL}:predict", json={"instances": [described["example"]]}).status_code == 200
