"""Shadow scoring: what the stable version has answered is scored once more by another one, and the logits compared.

It happens in one thread that rests most of the time, so that answers hardly feel it; what comes while it is busy is
dropped. Nothing that goes wrong in here reaches an answer.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import Any, Final, Literal, NamedTuple
from weakref import WeakSet

import numpy as np
from prometheus_client import Counter

from bundle import InputError
from bundle.store import SCHEMA, VOCABULARY
from service import body
from service.batcher import Scored
from service.body import Announced
from service.errors import ServiceError
from service.messages import Reply
from service.metrics import Metrics
from service.runtime import Request, Runtime
from service.settings import Settings
from service.signature import IDS
from service.tensors import Asked

WAITING: Final = 16  # requests that may wait
WAITING_BYTES: Final = 2**20  # that their bodies may have together
REST: Final = 99.0  # times as long as it has worked: it has the interpreter for a hundredth of the time at most

Read = Callable[[Runtime, bytes, Settings], tuple[Request, Any]]
Answer = Callable[[Runtime, Scored, Any], Reply]
Outcome = Literal["scored", "dropped", "refused", "failed"]

log = logging.getLogger(__name__)


class _Sample(NamedTuple):
    """A request that `stable` has answered with `logits`."""

    stable: Runtime
    shadow: Runtime
    read: Read
    raw: bytes
    coding: int
    logits: list[float]


class Shadow:
    """Takes samples on any thread, and compares them on its own."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._samples: deque[_Sample] = deque()
        self._bytes = 0
        self._is_working = False
        self._lock = Lock()
        self._closed = Event()
        self._runner = ThreadPoolExecutor(1, "shadow")  # its thread starts with the first sample
        self._counters: dict[tuple[str, Outcome], Counter] = {}
        self._reported: WeakSet[Runtime] = WeakSet()

    def after(self, answer: Answer, read: Read, shadow: Runtime, raw: bytes, announced: Announced) -> Answer:
        """The same answer, after which the request is left to be scored by `shadow`, where there is room for it."""
        if len(self._samples) >= WAITING:  # as most find it: then all else would be for nothing
            self._count(shadow, "dropped")
            return answer

        def answered(stable: Runtime, scored: Scored, asked: Any) -> Reply:
            reply = answer(stable, scored, asked)
            self._offer(_Sample(stable, shadow, read, raw, announced.coding, scored.logits))
            return reply

        return answered

    def close(self) -> None:
        """Forget what waits, and end."""
        self._closed.set()
        with self._lock:
            self._samples.clear()
        self._runner.shutdown(wait=False)

    def _offer(self, sample: _Sample) -> None:
        try:
            with self._lock:
                taken = self._has_room(sample)
                if taken:
                    self._samples.append(sample)
                    self._bytes += len(sample.raw)
                begins, self._is_working = taken and not self._is_working, taken or self._is_working
            if begins:
                self._runner.submit(self._work)
            if not taken:
                self._count(sample.shadow, "dropped")
        except Exception:
            log.exception("failed", extra={"facts": {"shadow": sample.shadow.manifest.version}})

    def _has_room(self, sample: _Sample) -> bool:
        fits = len(self._samples) < WAITING and self._bytes + len(sample.raw) <= WAITING_BYTES
        return fits and not self._closed.is_set()

    def _work(self) -> None:
        while sample := self._next():
            started = time.perf_counter()
            self._count(sample.shadow, self._compare(sample))
            self._closed.wait(REST * (time.perf_counter() - started))

    def _next(self) -> _Sample | None:
        with self._lock:
            if not self._samples:
                self._is_working = False
                return None
            sample = self._samples.popleft()
            self._bytes -= len(sample.raw)
            return sample

    def _compare(self, sample: _Sample) -> Outcome:
        model = sample.shadow.manifest.name
        try:
            logits = self._logits(sample)
        except (ServiceError, InputError):
            return "refused"
        except Exception:
            if sample.shadow not in self._reported:
                self._reported.add(sample.shadow)
                facts = {"model": model, "shadow": sample.shadow.manifest.version}
                log.exception("shadow failed", extra={"facts": facts})
            return "failed"
        self._metrics.shadow_difference.observe(model, np.abs(logits - np.array(sample.logits)))
        return "scored"

    def _logits(self, sample: _Sample) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Raises ServiceError or InputError where the shadow does not take what the stable version took."""
        limit = self._settings.max_body_bytes
        raw = body.inflate(sample.raw, sample.coding, limit=limit) if sample.coding else sample.raw
        request, asked = sample.read(sample.shadow, raw, self._settings)
        if isinstance(asked, Asked) and IDS in asked.inputs and not _share_ids(sample.stable, sample.shadow):
            raise InputError(expected="raw values, where the versions' ids differ", received="ids")
        return sample.shadow.logits_aside(sample.shadow.encoded([request]))

    def _count(self, shadow: Runtime, outcome: Outcome) -> None:
        key = shadow.manifest.name, outcome
        if key not in self._counters:  # to look a label up costs more than to count
            self._counters[key] = self._metrics.shadow.labels(*key)
        self._counters[key].inc()


def _share_ids(one: Runtime, other: Runtime) -> bool:
    """Whether an id means the same to both."""
    return all(one.manifest.files[name] == other.manifest.files[name] for name in (SCHEMA, VOCABULARY))
