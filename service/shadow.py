"""Shadow scoring: what the stable version has answered is scored once more by another one, and the logits compared.

It happens in one thread that rests nearly all the time, so that answers do not feel it: an answer that comes while it
works may wait for it, and those must be few beside the slowest hundredth. What comes while it has enough to do is
dropped. Nothing that goes wrong in here reaches an answer.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Lock
from typing import Any, Final, NamedTuple
from weakref import WeakSet, ref

import numpy as np

from bundle import InputError
from bundle.store import SCHEMA, VOCABULARY
from service import body
from service.batcher import Scored
from service.body import Announced
from service.errors import ServiceError
from service.messages import Reply
from service.metrics import Metrics
from service.outcomes import Look, Tally
from service.runtime import Request, Runtime
from service.settings import Settings
from service.signature import IDS
from service.tensors import Asked

WAITING: Final = 16  # requests that may wait
WAITING_BYTES: Final = 2**20  # that their bodies may have together
REST: Final = 499.0  # times as long as it has worked: it has the interpreter for a 500th of the time at most
LONGEST_REST: Final = 60.0  # seconds; what takes so long that this is less was stopped, or waited for others

Read = Callable[[Runtime, bytes, Settings], tuple[Request, Any]]
Answer = Callable[[Runtime, Scored, Any], Reply]

log = logging.getLogger(__name__)


class _Sample(NamedTuple):
    """A request for a model that `stable` has answered with `logits`. It may wait for minutes, and keeps no version."""

    model: str
    stable: ref[Runtime]
    shadow: ref[Runtime]
    read: Read
    raw: bytes
    coding: int
    logits: list[float]


class Shadow:
    """Takes samples on any thread, and compares them on its own."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._difference, self._tallies = settings, metrics.shadow_difference, metrics.shadow.tallies
        self._samples: deque[_Sample] = deque()
        self._bytes = 0
        self._is_working = False
        self._lock = Lock()
        self._closed = Event()
        self._runner = ThreadPoolExecutor(1, "shadow")  # its thread starts with the first sample
        self._reported: WeakSet[Runtime] = WeakSet()

    def after(self, answer: Answer, read: Read, shadow: Runtime, raw: bytes, announced: Announced) -> Answer:
        """The same answer, after which the request is left to be scored by `shadow`, where there is room for it, and
        else counted as dropped."""
        model = shadow.manifest.name
        if len(self._samples) >= WAITING:  # as most find it: then all else would be for nothing
            return partial(self._passed, self._tallies[model], answer)

        def answered(stable: Runtime, scored: Scored, asked: Any) -> Reply:
            reply = answer(stable, scored, asked)
            self._offer(_Sample(model, ref(stable), ref(shadow), read, raw, announced.coding, scored.logits))
            return reply

        return answered

    def _passed(self, tally: Tally, answer: Answer, stable: Runtime, scored: Scored, asked: Any) -> Reply:
        reply = answer(stable, scored, asked)
        with self._lock:
            tally.dropped += 1
        return reply

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
                else:
                    self._tallies[sample.model].dropped += 1
                begins, self._is_working = taken and not self._is_working, taken or self._is_working
            if begins:
                self._runner.submit(self._work)
        except Exception:
            log.exception("failed", extra={"facts": {"model": sample.model}})

    def _has_room(self, sample: _Sample) -> bool:
        fits = len(self._samples) < WAITING and self._bytes + len(sample.raw) <= WAITING_BYTES
        return fits and not self._closed.is_set()

    def _work(self) -> None:
        while (seconds := self._look()) is not None:
            self._closed.wait(min(REST * seconds, LONGEST_REST))

    def _look(self) -> float | None:
        """Compare the next sample: the seconds that it took, None where there is none. A version that has been unloaded
        takes its samples with it."""
        started = time.perf_counter()
        sample = self._next()
        if sample is None:
            return None
        tally, stable, shadow = self._tallies[sample.model], sample.stable(), sample.shadow()
        if stable is None or shadow is None:
            with self._lock:
                tally.dropped += 1
            return 0.0
        tally.looks[self._compare(sample, stable, shadow)] += 1
        return time.perf_counter() - started

    def _next(self) -> _Sample | None:
        with self._lock:
            if not self._samples:
                self._is_working = False
                return None
            sample = self._samples.popleft()
            self._bytes -= len(sample.raw)
            return sample

    def _compare(self, sample: _Sample, stable: Runtime, shadow: Runtime) -> Look:
        try:
            logits = self._logits(sample, stable, shadow)
        except (ServiceError, InputError):
            return "refused"
        except Exception:
            if shadow not in self._reported:
                self._reported.add(shadow)
                facts = {"model": sample.model, "shadow": shadow.manifest.version}
                log.exception("shadow failed", extra={"facts": facts})
            return "failed"
        self._difference.observe(sample.model, np.abs(logits - np.array(sample.logits)))
        return "scored"

    def _logits(self, sample: _Sample, stable: Runtime, shadow: Runtime) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Raises ServiceError or InputError where the shadow does not take what the stable version took."""
        limit = self._settings.max_body_bytes
        raw = body.inflate(sample.raw, sample.coding, limit=limit) if sample.coding else sample.raw
        request, asked = sample.read(shadow, raw, self._settings)
        if isinstance(asked, Asked) and IDS in asked.inputs and not _share_ids(stable, shadow):
            raise InputError(expected="raw values, where the versions' ids differ", received="ids")
        return shadow.logits_aside(shadow.encoded([request]))


def _share_ids(one: Runtime, other: Runtime) -> bool:
    """Whether an id means the same to both."""
    return all(one.manifest.files[name] == other.manifest.files[name] for name in (SCHEMA, VOCABULARY))
