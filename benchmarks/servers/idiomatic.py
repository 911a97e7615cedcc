"""FastAPI as its manual has it, around our encoder and our score graph. `python idiomatic.py <port> <bundle>`"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, create_model
from scorer import Scorer

scorer = Scorer(sys.argv[2])
optional: Any = (str | None, None)
Instance = create_model("Instance", **dict.fromkeys(scorer.names, optional))


class Question(BaseModel):
    instances: list[Instance]  # type: ignore[valid-type]


class Encoded(BaseModel):
    ids: list[list[int]]


class Answer(BaseModel):
    predictions: list[float]


app = FastAPI()


@app.post("/predict", response_model=Answer)
async def predict(question: Question) -> Answer:
    return Answer(predictions=scorer.rows([instance.model_dump() for instance in question.instances]))


@app.post("/ids", response_model=Answer)
async def ids(encoded: Encoded) -> Answer:
    return Answer(predictions=scorer.ids(encoded.ids))


uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="error", server_header=False)
