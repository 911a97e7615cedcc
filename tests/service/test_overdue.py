"""Work in threads waits for its turn no longer than a prediction does."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from service.candidates import CandidateSets
from service.catalog import Catalog
from service.errors import Overdue
from service.front import Front
from service.metrics import Metrics
from service.settings import Settings
from service.shadow import Shadow


def test_what_finds_no_free_thread_in_time_is_overdue(tmp_path: Path) -> None:
    settings, metrics = Settings(bundles=tmp_path, patience=0.05), Metrics()
    catalog = Catalog(settings, metrics)
    released = threading.Event()

    async def overload() -> None:
        sets, shadow = CandidateSets(catalog, settings, metrics), Shadow(settings, metrics)
        front = Front(catalog, sets, settings, shadow)
        busy = [asyncio.create_task(front._in_thread(released.wait)) for _ in range(os.cpu_count() or 1)]
        await asyncio.sleep(0)
        with pytest.raises(Overdue):
            await front._in_thread(lambda: None)
        released.set()
        assert await asyncio.gather(*busy) == [True] * len(busy)
        assert await front._in_thread(lambda: "at once") == "at once"

    asyncio.run(overload())
