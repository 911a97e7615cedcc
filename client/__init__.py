"""A client of the service, plain and async, with typed answers. httpx and msgspec only; pyarrow for `predict_arrow`.

>>> import client
>>> with client.Client("http://127.0.0.1:8000") as service:                             # doctest: +SKIP
...     answer = service.predict("demo-afm", [{"user": "u17", "app": "a3"}])
...     answer.predictions
"""

from client.answers import (
    ExplainAnswer,
    Explanation,
    FieldInfo,
    FieldTerm,
    Health,
    ModelAnswer,
    PairTerm,
    PredictAnswer,
    RankAnswer,
    Ranked,
    Rejected,
    Remaining,
    SizeInfo,
    Unknown,
    UnknownField,
    ValueTerm,
)
from client.clients import AsyncClient, Client
from client.errors import ClientError, Problem, Refusal, Refused, Unreachable, Unreadable

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "ExplainAnswer",
    "Explanation",
    "FieldInfo",
    "FieldTerm",
    "Health",
    "ModelAnswer",
    "PairTerm",
    "PredictAnswer",
    "Problem",
    "RankAnswer",
    "Ranked",
    "Refusal",
    "Refused",
    "Rejected",
    "Remaining",
    "SizeInfo",
    "Unknown",
    "UnknownField",
    "Unreachable",
    "Unreadable",
    "ValueTerm",
]
