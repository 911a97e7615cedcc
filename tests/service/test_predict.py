from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx import Client

import bundle
from service.messages import ModelAnswer, PredictAnswer

ROWS: list[dict[str, Any]] = [
    {"user": "u1", "app": "a1", "tags": ["fun", "new"], "age": 31},
    {"user": "nobody", "app": None, "tags": {"fun": 0.5}},
    {},
]


def predict(client: Client, model: str = "tiny-fm", **body: object) -> PredictAnswer:
    response = client.post(f"/v1/models/{model}:predict", json=body)
    assert response.status_code == 200, response.text
    return PredictAnswer.model_validate_json(response.content)


def test_predictions_are_the_bundles_own(client: Client, models: list[str], bundles: Path) -> None:
    for name in models:
        opened = bundle.open(bundles / name / "1")
        answer = predict(client, name, instances=ROWS, logits=True)
        assert answer.predictions == pytest.approx(opened.predict(ROWS).tolist(), abs=1e-6)
        assert answer.logits is not None
        assert answer.predictions == opened.manifest.predictions(np.array(answer.logits, np.float32)).tolist()
        assert (answer.model, answer.version, answer.digest) == (name, 1, opened.bundle.digest)


def test_columns_answer_as_rows(client: Client) -> None:
    columns = {name: [row.get(name) for row in ROWS] for name in ("user", "app", "tags", "age")}
    assert predict(client, columns=columns) == predict(client, instances=ROWS)


def test_a_batch_beyond_one_run_keeps_its_order(client: Client) -> None:
    one_by_one = [predict(client, instances=[row]).predictions[0] for row in ROWS]
    assert predict(client, instances=ROWS * 100).predictions == pytest.approx(one_by_one * 100, abs=1e-6)


def test_unknown_values_are_named(client: Client) -> None:
    answer = predict(client, instances=ROWS)
    assert [(found.instance, found.fields) for found in answer.unknown] == [(1, ["user"])]


def test_logits_are_left_out_unless_asked_for(client: Client) -> None:
    assert "logits" not in client.post("/v1/models/tiny-fm:predict", json={"instances": [{}]}).json()


def test_a_version_can_be_named(client: Client) -> None:
    response = client.post("/v1/models/tiny-fm/versions/1:predict", json={"instances": ROWS})
    assert response.json()["predictions"] == predict(client, instances=ROWS).predictions


def test_kserve_and_tensorflow_serving_clients_work(client: Client) -> None:
    assert "tiny-fm" in client.get("/v1/models").json()["models"]
    described = client.get("/v1/models/tiny-fm").json()
    assert (described["name"], described["ready"]) == ("tiny-fm", True)
    body = {"signature_name": "serving_default", "instances": [described["example"]]}
    assert len(client.post("/v1/models/tiny-fm:predict", json=body).json()["predictions"]) == 1


def test_the_content_type_is_not_asked_for(client: Client) -> None:
    headers = {"content-type": "application/octet-stream"}
    response = client.post("/v1/models/tiny-fm:predict", content=b'{"instances": [{}]}', headers=headers)
    assert response.status_code == 200


def test_a_model_describes_itself(client: Client, bundles: Path) -> None:
    for name in client.get("/v1/models").json()["models"]:
        opened = bundle.open(bundles / name / "1")
        described = ModelAnswer.model_validate_json(client.get(f"/v1/models/{name}").content)
        assert described == ModelAnswer.model_validate_json(client.get(f"/v1/models/{name}/versions/1").content)
        assert described.versions == [1]
        assert described.digest == opened.bundle.digest
        assert described.metrics == opened.bundle.report["metrics"]
        assert [field.name for field in described.fields or []] == list(opened.schema.names)
        assert predict(client, name, instances=[described.example]).unknown == []


def test_fields_say_what_they_take(client: Client) -> None:
    user, app, tags, age = client.get("/v1/models/tiny-fm").json()["fields"]
    assert user.keys() == {"name", "kind", "source", "vocabulary"}
    assert user["vocabulary"] > 0
    assert (app["source"], tags["source"]) == ("item", "item")
    assert (tags["kind"], tags["max_len"]) == ("multi", 3)
    assert (age["kind"], age["transform"]) == ("numeric", "standardise")
