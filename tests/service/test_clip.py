"""A regression with clip = true: every verb shows the clipped prediction, none of them loses the logit."""

import pytest
from httpx import Client

from service.messages import ExplainAnswer, PredictAnswer, RankAnswer

PAIRS = [{"user": f"u{user}", "app": f"a{app}"} for user in range(20) for app in range(12)]
ROWS = PAIRS + PAIRS[:20]  # beyond one run, and with rows that are equal


@pytest.fixture(scope="module")
def scored(clipping: Client) -> PredictAnswer:
    response = clipping.post("/v1/models/clipped-fm:predict", json={"instances": ROWS, "logits": True})
    return PredictAnswer.model_validate_json(response.content)


def clipped(logit: float) -> float:
    return min(max(logit, 0.0), 1.0)


def test_a_prediction_is_clipped(scored: PredictAnswer) -> None:
    logits = scored.logits or []
    assert min(logits) < 0.0 < 1.0 < max(logits)
    assert scored.predictions == [clipped(logit) for logit in logits]


def test_an_explanation_has_the_clipped_prediction_and_the_whole_logit(clipping: Client, scored: PredictAnswer) -> None:
    response = clipping.post("/v1/models/clipped-fm:explain", json={"instances": ROWS})
    explanations = ExplainAnswer.model_validate_json(response.content).explanations
    assert {each.link for each in explanations} == {"clip(0.0, 1.0)"}
    assert [each.logit for each in explanations] == pytest.approx(scored.logits, abs=1e-6)
    assert [each.prediction for each in explanations] == [clipped(each.logit) for each in explanations]


def test_a_ranking_keeps_the_order_that_the_clip_hides(clipping: Client, scored: PredictAnswer) -> None:
    body = {"context": {}, "candidates": ROWS, "top_k": len(ROWS)}
    response = clipping.post("/v1/models/clipped-fm:rank", json=body)
    ranked = RankAnswer.model_validate_json(response.content).ranked
    logits, predictions = scored.logits or [], scored.predictions
    by_logit = sorted(range(len(ROWS)), key=lambda index: (-logits[index], index))
    assert by_logit != sorted(range(len(ROWS)), key=lambda index: (-predictions[index], index))
    assert [each.index for each in ranked] == by_logit
    assert [each.score for each in ranked] == [predictions[index] for index in by_logit]
