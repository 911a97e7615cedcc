"""Loading and unloading while requests are answered."""

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bundle import EncodedRows
from service.alone import Alone
from service.batcher import Scored
from service.catalog import Catalog
from service.control import ChangeModel, Command, Member, Prepare, Serve
from service.errors import NotFound, NotReady
from service.metrics import Metrics
from service.settings import Settings

Publish = Callable[[int], Path]
Change = Callable[..., None]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(bundles=tmp_path, provider="cpu")


@pytest.fixture
def catalog(settings: Settings, metrics: Metrics) -> Catalog:
    return Catalog(settings, metrics)


@pytest.fixture
def change(publish: Publish, catalog: Catalog, settings: Settings, metrics: Metrics) -> Change:
    """Changes what serves, which is tiny-fm, version 1, from `tmp_path`."""
    publish(1)
    alone = Alone(settings)

    def apply(command: Command | Prepare) -> None:
        if isinstance(command, Prepare):
            catalog.open(command)
        else:
            assert isinstance(command, Serve)
            catalog.apply(command)

    asyncio.run(alone.join(Member(catalog.load, apply, catalog.inventory, metrics.registry)))

    def carry_out(action: str, model: str = "tiny-fm", **more: Any) -> None:
        asyncio.run(alone.carry_out(ChangeModel(action, model, **more)))  # type: ignore[arg-type]

    return carry_out


def info(metrics: Metrics) -> dict[str, float]:
    """factorlens_model_info by version."""
    (family,) = metrics.model_info.collect()
    return {sample.labels["version"]: sample.value for sample in family.samples}


def ready(metrics: Metrics) -> float:
    (family,) = metrics.ready.collect()
    return float(family.samples[0].value)


def test_a_load_takes_in_what_is_new_and_keeps_what_serves(
    change: Change, catalog: Catalog, publish: Publish, metrics: Metrics
) -> None:
    first = catalog.find("tiny-fm").version("1")
    publish(2)
    change("load")
    model = catalog.find("tiny-fm")
    assert (list(model.serving), model.version("1") is first) == (["2", "1"], True)
    publish(3)
    change("load")
    assert list(catalog.find("tiny-fm").serving) == ["3", "2"]
    assert info(metrics) == {"3": 1.0, "2": 1.0}


def test_a_reload_opens_anew_what_serves(change: Change, catalog: Catalog) -> None:
    first = catalog.find("tiny-fm").version(None)
    change("reload")
    assert catalog.find("tiny-fm").version(None) is not first


def test_a_version_that_was_moved_away_is_rolled_back(
    change: Change, catalog: Catalog, publish: Publish, tmp_path: Path
) -> None:
    first = catalog.find("tiny-fm").version(None)
    newest = publish(2)
    change("load")
    assert catalog.find("tiny-fm").version(None) is not first
    newest.rename(tmp_path / "taken-back")
    change("load")
    assert catalog.find("tiny-fm").version(None) is first
    assert list(catalog.find("tiny-fm").serving) == ["1"]


def test_a_version_that_was_replaced_is_opened_anew(change: Change, catalog: Catalog, tmp_path: Path) -> None:
    first = catalog.find("tiny-fm").version("1")
    manifest = tmp_path / "tiny-fm" / "1" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=3))
    change("load")
    assert catalog.find("tiny-fm").version("1").digest != first.digest


def test_an_unloaded_model_is_known_and_no_reason_to_be_unready(
    change: Change, catalog: Catalog, metrics: Metrics
) -> None:
    change("unload")
    assert (catalog.missing, ready(metrics), info(metrics)) == ("", 1.0, {})
    with pytest.raises(NotReady, match="tiny-fm is unloaded"):
        catalog.find("tiny-fm").version("1")
    change("unload")
    change("load")
    assert (list(catalog.find("tiny-fm").serving), info(metrics)) == (["1"], {"1": 1.0})


def test_a_broken_newest_version_is_an_error_and_the_older_one_goes_on(
    change: Change, catalog: Catalog, publish: Publish, metrics: Metrics
) -> None:
    first = catalog.find("tiny-fm").version("1")
    (publish(2) / "report.json").unlink()
    with pytest.raises(NotReady, match="version 2 of tiny-fm was refused"):
        change("load")
    model = catalog.find("tiny-fm")
    assert (model.version(None), list(model.rejected)) == (first, ["2"])
    assert ready(metrics) == 1.0


def test_what_serves_goes_on_where_nothing_can_be_loaded(change: Change, catalog: Catalog, tmp_path: Path) -> None:
    first = catalog.find("tiny-fm").version("1")
    (tmp_path / "tiny-fm" / "1" / "report.json").unlink()
    with pytest.raises(NotReady, match="version 1 of tiny-fm was refused"):
        change("reload")
    assert catalog.find("tiny-fm").version("1") is first


@pytest.mark.parametrize("name", ["nobody", "..", ".", "", "tiny-fm/1", "../tiny-fm", "stats"])
def test_no_name_is_a_path(change: Change, catalog: Catalog, name: str) -> None:
    for action in ("load", "reload", "unload"):
        with pytest.raises(NotFound):
            change(action, name)
    assert list(catalog.models) == ["tiny-fm"]


def test_a_model_that_came_later_is_found_and_loaded(
    change: Change, catalog: Catalog, tmp_path: Path, bundles: Path
) -> None:
    (tmp_path / "tiny-lr").symlink_to(bundles / "tiny-lr")
    assert catalog.unknown() == ["tiny-lr"]
    change("load", "tiny-lr")
    assert (catalog.unknown(), list(catalog.models)) == ([], ["tiny-fm", "tiny-lr"])


def test_requests_under_way_are_answered_and_the_memory_is_given_back(
    change: Change,
    catalog: Catalog,
) -> None:
    loaded = catalog.find("tiny-fm").version(None)
    rows = loaded.encoder.rows([{"user": "u1"}])
    expected = loaded.score(rows).logits
    started, unloaded = threading.Event(), threading.Event()
    answers: list[Scored] = []

    def slow(under_way: list[EncodedRows]) -> None:
        model = catalog.find("tiny-fm").version(None)
        started.set()
        unloaded.wait(10)
        answers.append(model.score(under_way[0]))

    thread = threading.Thread(target=slow, args=([rows],))
    thread.start()
    assert started.wait(10)
    change("unload")
    unloaded.set()
    thread.join(10)
    assert answers[0].logits == expected
    gone = weakref.ref(loaded)
    gc.disable()  # what holds itself would be freed sooner or later, or never: the service freezes what it has loaded
    try:
        del loaded
        assert gone() is None
    finally:
        gc.enable()


def test_what_serves_on_beside_a_broken_copy_of_it_is_not_refused(
    change: Change, catalog: Catalog, tmp_path: Path
) -> None:
    (tmp_path / "tiny-fm" / "1" / "weights.bin").write_bytes(b"broken")
    with pytest.raises(NotReady, match="version 1 of tiny-fm was refused"):
        change("reload")
    model = catalog.find("tiny-fm")
    assert (list(model.serving), model.rejected) == (["1"], {})
