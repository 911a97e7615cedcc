"""MLServer, the model in the process of the server. `python with_mlserver.py <port> <bundle>`

`/v2/models/model/infer` takes a tensor for each field, or `ids`; `/predict`, a handler of our own, takes rows.
"""

import asyncio
import json
import socket
import sys

from fastapi import Request, Response
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.handlers import custom_handler
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from scorer import Scorer


class Scored(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self.scorer = Scorer(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        first = payload.inputs[0]
        if first.name == "ids":
            predictions = self.scorer.ids([first.data.root[at : at + first.shape[1]] for at in _starts(first.shape)])
        else:
            predictions = self.scorer.columns({each.name: each.data.root for each in payload.inputs})
        output = ResponseOutput(name="predictions", shape=[len(predictions)], datatype="FP64", data=predictions)
        return InferenceResponse(model_name=self.name, outputs=[output])

    @custom_handler(rest_path="/predict")  # type: ignore[untyped-decorator]
    async def rows(self, request: Request) -> Response:
        predictions = self.scorer.rows((await request.json())["instances"])
        return Response(json.dumps({"predictions": predictions}), media_type="application/json")


def _starts(shape: list[int]) -> range:
    return range(0, shape[0] * shape[1], shape[1])


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


async def main(port: int, bundle: str) -> None:
    settings = Settings(
        host="127.0.0.1", http_port=port, grpc_port=_free(), metrics_port=_free(), debug=False, parallel_workers=0
    )
    model = ModelSettings(name="model", implementation=Scored, parameters=ModelParameters(uri=bundle))
    await MLServer(settings).start([model])


asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
