"""LitServe: a process for HTTP and one for the model, as it always has. `python with_litserve.py <port> <bundle>`"""

import sys
from typing import Any

import litserve
from scorer import Scorer


class Scored(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.scorer = Scorer(sys.argv[2])

    def predict(self, request: dict[str, Any]) -> list[float]:
        return self.scorer.ids(request["ids"]) if "ids" in request else self.scorer.rows(request["instances"])

    def encode_response(self, predictions: list[float]) -> dict[str, list[float]]:
        return {"predictions": predictions}


if __name__ == "__main__":
    server = litserve.LitServer(Scored(), accelerator="cpu", devices=1, workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False, generate_client_file=False)
