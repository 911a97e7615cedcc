"""The two clients: the same calls, carried out in a thread of yours or on an event loop."""

import asyncio
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import httpx

from client import bulk, calls
from client.answers import ExplainAnswer, Health, ModelAnswer, PredictAnswer, RankAnswer
from client.calls import Call, Row, Rows, Version
from client.errors import Unreadable
from client.exchange import Outcome, Pause, Policy, Send, steps

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

TIMEOUT, DEADLINE, GZIP_OVER = 5.0, 30.0, 65_536


class Client:
    """Calls the service at `url`. Keeps connections open and may be used by several threads; close it, or use `with`.

    A try may be silent for `timeout` seconds. A call that meets a busy service or a broken connection is tried again
    until `deadline` seconds are over. Bodies of more than `gzip_over` bytes are compressed. `transport` is httpx's,
    for proxies, certificates and tests; `key` is an API key of the service. `rows` are a list of {field: value}, or one
    {field: [values]}; NaN is missing. `version` is a number, or "stable", "canary" or "shadow". Every method raises
    ClientError: Refused, Unreachable or Unreadable.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        deadline: float = DEADLINE,
        gzip_over: int = GZIP_OVER,
        transport: httpx.BaseTransport | None = None,
        key: str | None = None,
    ) -> None:
        self._policy = Policy(timeout, deadline, gzip_over)
        self._http = httpx.Client(base_url=url, transport=transport, headers=_authorized(key))

    def predict(self, model: str, rows: Rows, *, logits: bool = False, version: Version | None = None) -> PredictAnswer:
        """A prediction for every row."""
        return self._run(calls.predict(model, rows, logits=logits, version=version))

    def explain(
        self, model: str, rows: Rows, *, top_k: int | None = None, version: Version | None = None
    ) -> ExplainAnswer:
        """What every field and pair of fields contributed to the score of each row, with the `top_k` largest pairs."""
        return self._run(calls.explain(model, rows, top_k=top_k, version=version))

    def rank(
        self,
        model: str,
        context: Row,
        candidates: Rows,
        *,
        top_k: int | None = None,
        explain: int | None = None,
        version: Version | None = None,
    ) -> RankAnswer:
        """The `top_k` best candidates for a context, the first `explain` of them explained."""
        call = calls.rank(model, context, candidates, top_k=top_k, explain=explain, version=version)
        return self._run(call)

    def predict_arrow(
        self, model: str, table: "pa.Table | pa.RecordBatch", *, version: Version | None = None
    ) -> "pa.Table":
        """A table of `prediction`, `logit` and `unknown` (names of fields) for a table of raw values; needs pyarrow."""
        return self._run(bulk.predict_arrow(model, table, version=version))

    def models(self) -> list[str]:
        """The names of all models, ready or not."""
        return self._run(calls.models())

    def model(self, name: str, *, version: Version | None = None) -> ModelAnswer:
        """Fields, versions, metrics and an example instance of a model."""
        return self._run(calls.model(name, version=version))

    def health(self) -> Health:
        """Whether every model has a version that serves; asked once. A service that is not ready is no error."""
        return self._run(calls.health())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _run(self, call: Call[T]) -> T:
        running, outcome = steps(call, self._policy), None
        try:
            while True:
                outcome = self._do(running.send(outcome))
        except StopIteration as ended:
            answer: T = ended.value
            return answer

    def _do(self, step: Send | Pause) -> Outcome | None:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        try:
            return self._http.request(
                step.call.method,
                step.call.path,
                content=step.call.content,
                headers=step.call.headers,
                timeout=step.timeout,
            )
        except httpx.TransportError as error:
            return error
        except httpx.RequestError as error:
            raise Unreadable(f"the answer cannot be read: {error}") from None


class AsyncClient:
    """`Client` for an event loop: the same methods, to be awaited; close it with `aclose`, or use `async with`."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        deadline: float = DEADLINE,
        gzip_over: int = GZIP_OVER,
        transport: httpx.AsyncBaseTransport | None = None,
        key: str | None = None,
    ) -> None:
        self._policy = Policy(timeout, deadline, gzip_over)
        self._http = httpx.AsyncClient(base_url=url, transport=transport, headers=_authorized(key))

    async def predict(
        self, model: str, rows: Rows, *, logits: bool = False, version: Version | None = None
    ) -> PredictAnswer:
        """See Client."""
        return await self._run(calls.predict(model, rows, logits=logits, version=version))

    async def explain(
        self, model: str, rows: Rows, *, top_k: int | None = None, version: Version | None = None
    ) -> ExplainAnswer:
        """See Client."""
        return await self._run(calls.explain(model, rows, top_k=top_k, version=version))

    async def rank(
        self,
        model: str,
        context: Row,
        candidates: Rows,
        *,
        top_k: int | None = None,
        explain: int | None = None,
        version: Version | None = None,
    ) -> RankAnswer:
        """See Client."""
        call = calls.rank(model, context, candidates, top_k=top_k, explain=explain, version=version)
        return await self._run(call)

    async def predict_arrow(
        self, model: str, table: "pa.Table | pa.RecordBatch", *, version: Version | None = None
    ) -> "pa.Table":
        """See Client."""
        return await self._run(bulk.predict_arrow(model, table, version=version))

    async def models(self) -> list[str]:
        """See Client."""
        return await self._run(calls.models())

    async def model(self, name: str, *, version: Version | None = None) -> ModelAnswer:
        """See Client."""
        return await self._run(calls.model(name, version=version))

    async def health(self) -> Health:
        """See Client."""
        return await self._run(calls.health())

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _run(self, call: Call[T]) -> T:
        running, outcome = steps(call, self._policy), None
        try:
            while True:
                outcome = await self._do(running.send(outcome))
        except StopIteration as ended:
            answer: T = ended.value
            return answer

    async def _do(self, step: Send | Pause) -> Outcome | None:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return None
        try:
            return await self._http.request(
                step.call.method,
                step.call.path,
                content=step.call.content,
                headers=step.call.headers,
                timeout=step.timeout,
            )
        except httpx.TransportError as error:
            return error
        except httpx.RequestError as error:
            raise Unreadable(f"the answer cannot be read: {error}") from None


def _authorized(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}
