from typing import Any

import pytest
from httpx import Client

from service.messages import ExplainAnswer, Explanation

ROWS: list[dict[str, Any]] = [
    {"user": "u1", "app": "a1", "tags": ["fun", "new"], "age": 31},
    {"user": "nobody", "tags": {"fun": 0.5}},
    {},
]


def explain(client: Client, model: str, **body: object) -> list[Explanation]:
    response = client.post(f"/v1/models/{model}:explain", json=body)
    assert response.status_code == 200, response.text
    return ExplainAnswer.model_validate_json(response.content).explanations


def total(explanation: Explanation) -> float:
    fields = sum(field.contribution for field in explanation.fields)
    pairs = sum(pair.contribution for pair in explanation.pairs) + explanation.remaining.contribution
    return explanation.bias + fields + pairs + explanation.residual


@pytest.mark.parametrize("top_k", [1, 3, 10**30])
def test_terms_add_up_to_the_score_graphs_logit(client: Client, models: list[str], top_k: int) -> None:
    for model in models:
        scored = client.post(f"/v1/models/{model}:predict", json={"instances": ROWS, "logits": True}).json()
        explanations = explain(client, model, instances=ROWS, top_k=top_k)
        assert [each.logit for each in explanations] == pytest.approx(scored["logits"], abs=1e-6)
        assert [each.prediction for each in explanations] == pytest.approx(scored["predictions"], abs=1e-6)
        for each in explanations:
            assert total(each) == pytest.approx(each.logit, abs=1e-5)
            assert each.completeness_error == pytest.approx(abs(total(each) - each.logit), abs=1e-9)
            assert each.exact == (each.method == "terms")
            assert each.residual == 0 or not each.exact


def test_top_k_bounds_the_pairs_and_the_rest_is_summed(client: Client) -> None:
    few, all_ = (explain(client, "tiny-fm", instances=ROWS[:1], top_k=top_k)[0] for top_k in (2, 6))
    assert few.pairs == all_.pairs[:2]
    assert (len(few.pairs), few.remaining.count, all_.remaining.count) == (2, 4, 0)
    assert few.remaining.contribution == pytest.approx(sum(pair.contribution for pair in all_.pairs[2:]), abs=1e-6)


def test_columns_answer_as_rows(client: Client) -> None:
    columns = {name: [row.get(name) for row in ROWS] for name in ("tags", "user", "app", "age")}
    assert explain(client, "tiny-fm", columns=columns) == explain(client, "tiny-fm", instances=ROWS)


def test_fields_name_their_values(client: Client) -> None:
    full, unknown, empty = explain(client, "tiny-fm", instances=ROWS)
    user, app, tags, _ = full.fields
    assert [value.value for value in tags.values or []] == ["fun", "new"]
    assert sum(value.contribution for value in tags.values or []) == pytest.approx(tags.contribution, abs=1e-6)
    assert user.values is app.values is None
    assert [field.known for field in unknown.fields] == [False, True, True, True]
    assert [value.value for value in empty.fields[2].values or []] == [None]


def test_values_are_those_of_their_own_row_in_every_run(client: Client) -> None:
    rows = [{"tags": [f"t{instance}"]} for instance in range(300)]
    named = [each.fields[2].values for each in explain(client, "tiny-fm", instances=rows)]
    assert [[value.value for value in values or []] for values in named] == [row["tags"] for row in rows]


def test_sizes_stand_beside_the_terms(client: Client) -> None:
    sized = client.get("/v1/models/tiny-afm").json()["sizes"]
    assert sized == [{"name": "attention", "axis": "pair"}]
    body = {"instances": ROWS[:1]}
    (explanation,) = client.post("/v1/models/tiny-afm:explain", json=body).json()["explanations"]
    assert all(pair.keys() == {"fields", "contribution", "attention"} for pair in explanation["pairs"])


def test_a_batch_beyond_one_run_keeps_its_order(client: Client) -> None:
    logits = [each.logit for each in explain(client, "tiny-fm", instances=ROWS * 60)]
    assert logits == pytest.approx([each.logit for each in explain(client, "tiny-fm", instances=ROWS)] * 60, abs=1e-6)
