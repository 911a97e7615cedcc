"""The Open Inference Protocol, as a client of Triton speaks it to a live service: tritonclient, sync and aio."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

import bundle
from bundle import EncodedRows

Started = Callable[..., AbstractContextManager[tuple[Any, str]]]

KEY = "canary-key-of-the-tests"
ROWS = [
    {"user": "u1", "app": "a1", "tags": ["fun", "été"], "age": 37},
    {"user": "u2", "app": "nobody", "tags": [], "age": None},
    {"user": "", "app": "a3", "tags": ["new"], "age": 20.5},
]
RAW = {
    "user": np.array([b"u1", b"u2", b""], np.object_),
    "app": np.array([["a1"], ["nobody"], ["a3"]], np.object_),
    "tags": np.array([["fun", "été", ""], ["", "", ""], ["new", "", ""]], np.object_),
    "age": np.array(["37", "", "20.5"], np.object_),
}
TWICE = pytest.mark.parametrize("model", ["tiny-nfm", "tiny-afm"])


@pytest.fixture(scope="module")
def folder(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles that a test may add to: tiny-nfm, tiny-afm, ids-only-fm."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("tiny-nfm", "tiny-afm", "ids-only-fm"):
        shutil.copytree(bundles / name, root / name)
    return root


@pytest.fixture(scope="module")
def url(folder: Path, started: Started) -> Iterator[str]:
    with started("--bundles", str(folder), "--admin", "true", "--admin-key", KEY, "--max-rows", "500") as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        yield client


def inputs(arrays: dict[str, NDArray[Any]], *, binary: bool) -> list[triton.InferInput]:
    made = []
    for name, array in arrays.items():
        tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        made.append(tensor.set_data_from_numpy(array, binary_data=binary))
    return made


def predicted(url: str, model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"instances": rows, "logits": True}
    return dict(httpx.post(f"{url}/v1/models/{model}:predict", json=body).raise_for_status().json())


def encoded(folder: Path, model: str, rows: list[dict[str, Any]]) -> EncodedRows:
    return bundle.open(folder / model / "1").encoder.rows(rows)


def assert_equal(result: triton.InferResult, answer: dict[str, Any]) -> None:
    """The same scores to the last bit but one of the graph: a batch of another size may round differently."""
    np.testing.assert_allclose(result.as_numpy("prediction"), answer["predictions"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.as_numpy("logit"), answer["logits"], rtol=0, atol=1e-6)
    assert (result.as_numpy("prediction").dtype, result.as_numpy("logit").dtype) == (np.float64, np.float32)


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert (client.is_server_live(), client.is_server_ready(), client.is_model_ready("tiny-nfm")) == (True, True, True)
    assert (client.is_model_ready("tiny-nfm", "1"), client.is_model_ready("tiny-nfm", "2")) == (True, False)
    assert client.is_model_ready("nobody") is False
    server = client.get_server_metadata()
    assert (server["name"], server["version"]) == ("factorlens", "0.1.0")
    assert "binary_tensor_data" in server["extensions"]
    assert client.get_model_metadata("tiny-nfm", "1") == {
        "name": "tiny-nfm",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "ids", "datatype": "INT64", "shape": [-1, 6]},
            {"name": "values", "datatype": "FP32", "shape": [-1, 6]},
            {"name": "user", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "app", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "tags", "datatype": "BYTES", "shape": [-1, 3]},
            {"name": "age", "datatype": "BYTES", "shape": [-1, 1]},
        ],
        "outputs": [
            {"name": "prediction", "datatype": "FP64", "shape": [-1]},
            {"name": "logit", "datatype": "FP32", "shape": [-1]},
        ],
    }
    assert [each["name"] for each in client.get_model_metadata("ids-only-fm")["inputs"]] == ["ids", "user", "app"]


def test_configuration(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("tiny-nfm")
    assert (config["name"], config["platform"], config["max_batch_size"]) == ("tiny-nfm", "onnxruntime_onnx", 500)
    assert config["input"][0] == {"name": "ids", "data_type": "TYPE_INT64", "dims": [6], "optional": True}
    assert config["input"][4] == {"name": "tags", "data_type": "TYPE_STRING", "dims": [3], "optional": True}
    assert config["output"][1] == {"name": "logit", "data_type": "TYPE_FP32", "dims": []}
    assert config["instance_group"] == [{"kind": "KIND_CPU", "count": 1}]


@TWICE
@pytest.mark.parametrize("binary", [True, False])
def test_raw_categories_score_as_predict_does(
    client: triton.InferenceServerClient, url: str, model: str, binary: bool
) -> None:
    answer = predicted(url, model, ROWS)
    result = client.infer(model, inputs(RAW, binary=binary), request_id="mine-7")
    assert_equal(result, answer)
    said = result.get_response()
    assert (said["id"], said["model_name"], said["model_version"]) == ("mine-7", model, "1")
    assert said["parameters"] == {"digest": answer["digest"], "unknown": 2}
    assert [each["fields"] for each in answer["unknown"]] == [["app"], ["user"]]


@TWICE
@pytest.mark.parametrize("binary", [True, False])
def test_ids_score_as_predict_does(
    client: triton.InferenceServerClient, url: str, folder: Path, model: str, binary: bool
) -> None:
    rows = ROWS * 100
    sent = encoded(folder, model, rows)
    result = client.infer(model, inputs(sent._asdict(), binary=binary), model_version="1")
    assert_equal(result, predicted(url, model, rows))


def test_outputs_are_those_asked_for(client: triton.InferenceServerClient) -> None:
    asked = [triton.InferRequestedOutput("logit", binary_data=False), triton.InferRequestedOutput("prediction")]
    said = client.infer("tiny-nfm", inputs(RAW, binary=True), outputs=asked).get_response()
    assert [each["name"] for each in said["outputs"]] == ["logit", "prediction"]
    assert (len(said["outputs"][0]["data"]), said["outputs"][1]["parameters"]) == (3, {"binary_data_size": 24})
    alone = client.infer("tiny-nfm", inputs(RAW, binary=True), outputs=asked[:1])
    assert alone.as_numpy("prediction") is None
    assert "parameters" not in alone.get_response()["outputs"][0]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: triton.InferenceServerClient, url: str, algorithm: str) -> None:
    both = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    assert_equal(client.infer("tiny-nfm", inputs(RAW, binary=True), **both), predicted(url, "tiny-nfm", ROWS))


def test_statistics_count_rows_runs_and_requests(client: triton.InferenceServerClient) -> None:
    def now() -> dict[str, Any]:
        return dict(client.get_inference_statistics("ids-only-fm", "1")["model_stats"][0])

    before = now()
    one, many = ({"user": np.array(["u1"] * rows, np.object_)} for rows in (1, 7))
    for sent in (one, many, many):
        client.infer("ids-only-fm", inputs(sent, binary=True))
    with pytest.raises(InferenceServerException):
        client.infer("ids-only-fm", inputs({"user": np.array([1.5])}, binary=True))
    after = now()
    assert after["inference_count"] - before["inference_count"] == 15
    assert after["execution_count"] - before["execution_count"] == 3
    stages = after["inference_stats"]
    assert (stages["success"]["count"], stages["fail"]["count"]) == (3, 1)
    assert stages["compute_infer"]["count"] == 3
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert stages["success"]["ns"] == pytest.approx(sum(stages[part]["ns"] for part in parts), abs=10)
    sizes = {each["batch_size"]: each["compute_infer"]["count"] for each in after["batch_stats"]}
    assert sizes == {1: 1, 7: 2}
    assert 0 < sum(each["compute_infer"]["ns"] for each in after["batch_stats"]) <= stages["compute_infer"]["ns"]
    assert after["last_inference"] > 1_700_000_000_000
    assert after["memory_usage"][0]["byte_size"] > 1000
    everything = client.get_inference_statistics()["model_stats"]
    assert [each["name"] for each in everything] == ["ids-only-fm", "tiny-afm", "tiny-nfm"]


def test_errors_have_a_status_and_a_sentence_without_what_was_sent(client: triton.InferenceServerClient) -> None:
    out_of_range = np.full((2, 2), 999_999_937)
    for status, model, sent in (
        ("404", "secret-model", {"user": np.array(["u1"], np.object_)}),
        ("400", "ids-only-fm", {"secret-field": np.array(["u1"], np.object_)}),
        ("400", "ids-only-fm", {"ids": out_of_range}),
        ("400", "tiny-nfm", {"age": np.array(["secret-age"], np.object_)}),
        ("400", "tiny-nfm", {"user": np.array(["u1"] * 501, np.object_)}),
    ):
        with pytest.raises(InferenceServerException) as refused:
            client.infer(model, inputs(sent, binary=True))
        assert refused.value.status() == status
        assert len(refused.value.message()) > 40
        assert "secret" not in refused.value.message()
        assert "999999937" not in refused.value.message()
    shared = triton.InferInput("ids", [1, 2], "INT64").set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match="no shared_memory_region"):
        client.infer("ids-only-fm", [shared])
    with pytest.raises(InferenceServerException, match="no classification"):
        client.infer("tiny-nfm", inputs(RAW, binary=True), outputs=[triton.InferRequestedOutput("logit", True, 2)])
    with pytest.raises(InferenceServerException, match="the addresses are listed at /docs"):
        client.get_log_settings()


def test_the_repository_loads_and_unloads(client: triton.InferenceServerClient, folder: Path, url: str) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    for load in (client.load_model, client.unload_model):
        for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"}):
            with pytest.raises(InferenceServerException, match="admin_key"):
                load("tiny-afm", headers=headers)
    client.unload_model("tiny-afm", headers=key)
    assert (client.is_model_ready("tiny-afm"), client.is_server_ready()) == (False, True)
    with pytest.raises(InferenceServerException, match="tiny-afm is unloaded"):
        client.infer("tiny-afm", inputs(RAW, binary=True))
    shutil.copytree(folder / "tiny-nfm" / "1", folder / "tiny-nfm" / "2")
    index = {(each["name"], each.get("version")): each for each in client.get_model_repository_index()}
    assert index["tiny-afm", None] == {"name": "tiny-afm", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert index["tiny-nfm", "1"]["state"] == "READY"
    client.load_model("tiny-afm", headers=key)
    assert client.is_model_ready("tiny-afm")
    assert_equal(client.infer("tiny-afm", inputs(RAW, binary=True)), predicted(url, "tiny-afm", ROWS))
    with pytest.raises(InferenceServerException, match="its manifest says that it is tiny-nfm version 1"):
        client.load_model("tiny-nfm", headers=key)
    assert client.infer("tiny-nfm", inputs(RAW, binary=True)).get_response()["model_version"] == "1"
    config = json.dumps({"name": "tiny-nfm"})
    for given in ({"config": config}, {"config": config, "files": {"file:1/model.onnx": b"x"}}):
        with pytest.raises(InferenceServerException, match="no config and no file:") as refused:
            client.load_model("tiny-nfm", headers=key, **given)
        assert refused.value.status() == "400"
    with pytest.raises(InferenceServerException, match="no bundle of that name") as refused:
        client.load_model("..", headers=key)
    assert refused.value.status() == "404"


def test_the_aio_client_is_answered_as_well(url: str, folder: Path) -> None:
    ids = encoded(folder, "tiny-nfm", ROWS)._asdict()

    async def ask() -> tuple[Any, ...]:
        async with triton_aio.InferenceServerClient(url.removeprefix("http://")) as client:
            healthy = (await client.is_server_live(), await client.is_server_ready())
            described = (await client.get_model_metadata("tiny-nfm"), await client.get_model_config("tiny-nfm"))
            counted = await client.get_inference_statistics("tiny-nfm")
            index = await client.get_model_repository_index()
            asks = [
                client.infer("tiny-nfm", inputs(sent, binary=binary), request_compression_algorithm=algorithm)
                for sent in (RAW, ids)
                for binary in (True, False)
                for algorithm in (None, "gzip")
            ]
            results = await asyncio.gather(*asks)
            with pytest.raises(InferenceServerException, match="setting admin_key") as refused:
                await client.unload_model("tiny-nfm")
            return healthy, described, counted, index, results, refused.value.status()

    healthy, (metadata, config), counted, index, results, status = asyncio.run(ask())
    assert (healthy, status) == ((True, True), "401")
    assert metadata["name"] == config["name"] == counted["model_stats"][0]["name"] == "tiny-nfm"
    assert len(index) >= 3
    for result in results:
        assert_equal(result, predicted(url, "tiny-nfm", ROWS))
