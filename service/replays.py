"""Golden rows, replayed while a version serves: answers that went wrong without an error are found within minutes."""

import asyncio
import logging
import random
from typing import Final

from anyio import to_thread

from bundle import BundleInvalid, RuntimeRefused
from service.catalog import Catalog
from service.control import ChangeModel, Control
from service.errors import ServiceError
from service.metrics import Metrics
from service.runtime import Runtime

SECONDS: Final = 60.0  # from one replay to the next

log = logging.getLogger(__name__)


class Replays:
    """Has every version replay its golden rows, in a thread of its own; one whose answers differ is quarantined."""

    def __init__(self, catalog: Catalog, control: Control, metrics: Metrics) -> None:
        self._catalog, self._control, self._metrics = catalog, control, metrics

    async def run(self) -> None:
        await asyncio.sleep(random.uniform(0, SECONDS))  # workers are not to do it all at once
        while True:
            try:
                await self._replay_all()  # no version is held while this sleeps
            except Exception:  # it is to go on for as long as the service does
                log.exception("failed")
            await asyncio.sleep(SECONDS)

    async def _replay_all(self) -> None:
        for model in self._catalog.models.values():
            for loaded in model.serving.values():
                outcome = await to_thread.run_sync(_replay, loaded)
                self._metrics.replays.labels(model.name, outcome).inc()
                if outcome == "differs":
                    await self._quarantine(loaded)

    async def _quarantine(self, loaded: Runtime) -> None:
        manifest = loaded.manifest
        wish = ChangeModel(
            "quarantine", manifest.name, manifest.version, "its golden rows got other answers than before"
        )
        try:
            await self._control.carry_out(wish)
        except ServiceError as error:  # another worker may have been first
            log.warning("not quarantined", extra={"facts": {**loaded.identity, "reason": str(error)}})


def _replay(loaded: Runtime) -> str:
    try:
        loaded.predictor.replay()
    except BundleInvalid as error:
        log.error("replay failed", extra={"facts": {**loaded.identity, "reason": error.reason}})
        loaded.has_failed = isinstance(error.__cause__, RuntimeRefused)  # then another process is to take over
        return "failed" if loaded.has_failed else "differs"
    except Exception:
        log.exception("replay failed", extra={"facts": dict(loaded.identity)})
        return "failed"
    return "same"
