"""Shadow scoring: what the stable version has answered is scored once more by another one, and the logits compared.

It happens in one thread that rests nearly all the time, so that answers do not feel it: an answer that comes while it
works may wait for it, and those must be few beside the slowest hundredth. So it looks at a sample: one request waits,
and for all that come meanwhile nothing is done at all. Nothing that goes wrong in here reaches an answer.
"""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
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
from service.outcomes import Look
from service.runtime import Runtime
from service.scoring import Answer, Form, Read
from service.settings import Settings
from service.signature import IDS
from service.tensors import Asked

LONGEST_BODY: Final = 2**20  # bytes, as they came; one that waits stays in memory
REST: Final = 499.0  # times as long as it has worked: it has the interpreter for a 500th of the time at most
LONGEST_REST: Final = 60.0  # seconds; what takes so long that this is less was stopped, or waited for others

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
        self._settings, self._difference, self._looks = settings, metrics.shadow_difference, metrics.shadow.looks
        self.has_room = True  # for a request; where it has none, whoever asks is spared the rest
        self._sample: _Sample | None = None
        self._is_working = False
        self._lock = Lock()
        self._closed = Event()
        self._runner = ThreadPoolExecutor(1, "shadow")  # its thread starts with the first sample
        self._reported: WeakSet[Runtime] = WeakSet()

    def after(self, form: Form, shadow: Runtime, raw: bytes, announced: Announced) -> Answer:
        """What answers, and then leaves the request to be scored by `shadow`, if no other was quicker."""

        def answered(stable: Runtime, scored: Scored, asked: Any) -> Reply:
            reply = form.answer(stable, scored, asked)
            model = shadow.manifest.name
            self._offer(_Sample(model, ref(stable), ref(shadow), form.read, raw, announced.coding, scored.logits))
            return reply

        return answered

    def close(self) -> None:
        """Forget what waits, and end."""
        self._closed.set()
        with self._lock:
            self._sample, self.has_room = None, False
        self._runner.shutdown(wait=False)

    def _offer(self, sample: _Sample) -> None:
        try:
            with self._lock:
                if not self.has_room or len(sample.raw) > LONGEST_BODY:
                    return
                self._sample, self.has_room = sample, False
                begins, self._is_working = not self._is_working, True
            if begins:
                self._runner.submit(self._work)
        except Exception:
            log.exception("failed", extra={"facts": {"model": sample.model}})
            with self._lock:
                self._sample, self._is_working, self.has_room = None, False, not self._closed.is_set()

    def _work(self) -> None:
        while (seconds := self._look()) is not None:
            self._closed.wait(min(REST * seconds, LONGEST_REST))

    def _look(self) -> float | None:
        """Compare the sample that waits: the seconds that it took, None where there is none. A version that has been
        unloaded takes it with it."""
        started = time.perf_counter()
        sample = self._next()
        if sample is None:
            return None
        stable, shadow = sample.stable(), sample.shadow()
        if stable is None or shadow is None:
            return 0.0
        self._looks[sample.model][self._compare(sample, stable, shadow)] += 1
        return time.perf_counter() - started

    def _next(self) -> _Sample | None:
        with self._lock:
            sample, self._sample = self._sample, None
            self._is_working, self.has_room = sample is not None, not self._closed.is_set()
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
