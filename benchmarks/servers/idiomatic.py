"""FastAPI as its manual has it, around our encoder and our score graph. `python idiomatic.py <port> <bundle>`"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, create_model

import bundle

model = bundle.open(sys.argv[2])
optional: Any = (str | None, None)
Instance = create_model("Instance", **dict.fromkeys(model.schema.names, optional))


class Question(BaseModel):
    instances: list[Instance]  # type: ignore[valid-type]


class Answer(BaseModel):
    predictions: list[float]


app = FastAPI()


@app.post("/v1/models/{name}:predict", response_model=Answer)
async def predict(name: str, question: Question) -> Answer:
    rows = [instance.model_dump() for instance in question.instances]
    return Answer(predictions=model.predict(rows).tolist())


uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="error", server_header=False)
