import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI

from service import logs
from service.app import Service, create_app
from service.settings import Settings
from tests.conftest import tiny_recipe, write_log
from training.pipeline import Options, run
from training.recipe import check


class InProcess(httpx.BaseTransport):
    """A real app over ASGI, called from a plain `httpx.Client`."""

    def __init__(self, app: FastAPI, portal: BlockingPortal) -> None:
        self._asgi, self._portal = httpx.ASGITransport(app), portal

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._portal.call(self._answer, request)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        response = await self._asgi.handle_async_request(request)
        return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())


@contextmanager
def running(app: FastAPI) -> Iterator[httpx.Client]:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(app.router.lifespan_context(app)):
        yield httpx.Client(transport=InProcess(app, portal), base_url="http://service")


def limited(bundles: Path, *, admin: bool) -> Service:
    """The service over the tiny bundles, with limits that a test can reach."""
    limits = {"max_rows": 300, "max_candidates": 300, "max_arrow_rows": 500, "max_body_bytes": 100_000}
    return create_app(Settings.model_validate({"bundles": bundles, "provider": "cpu", "admin": admin, **limits}))


@pytest.fixture(scope="session")
def app(bundles: Path) -> FastAPI:
    return limited(bundles, admin=False)


@pytest.fixture(scope="session")
def client(app: FastAPI) -> Iterator[httpx.Client]:
    with running(app) as client:
        yield client


@pytest.fixture(scope="module")
def administered(bundles: Path) -> Iterator[httpx.Client]:
    """The same where requests may change what is served."""
    with running(limited(bundles, admin=True)) as client:
        yield client


@pytest.fixture(scope="session")
def models(bundles: Path) -> list[str]:
    """The served models that share the fields user, app, tags and age."""
    return sorted(path.name for path in bundles.glob("tiny-*"))


@pytest.fixture(scope="module")
def clipping(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Serves the regression clipped-fm, whose logits leave the range of its labels, 0 to 1, on both sides."""
    root = tmp_path_factory.mktemp("clipping")
    recipe = {
        "name": "clipped-fm",
        "task": "regression",
        "clip": True,
        "data": {"train": str(log), "label": "clicked"},
        "fields": {"user": {"kind": "categorical"}, "app": {"kind": "categorical", "source": "item"}},
        "model": {"key": "fm", "embedding_dim": 8},
        "fit": {"epochs": 20, "patience": 20, "batch_size": 64, "optimizer": "adam", "learning_rate": 0.5},
    }
    run(check(recipe, origin="of the tests"), Options(artifacts=root, checkpoints=root / ".checkpoints", device="cpu"))
    with running(create_app(Settings(bundles=root, provider="cpu"))) as client:
        yield client


@pytest.fixture(scope="module")
def ranking(ranking_bundle: Path) -> Iterator[httpx.Client]:
    """Serves tiny-ranking, whose task is ranking."""
    with running(create_app(Settings(bundles=ranking_bundle.parent.parent, provider="cpu"))) as client:
        yield client


@pytest.fixture(scope="session")
def three_versions(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-fm: 1; 2 with the values of another log, in another order; and 3, which has user and app alone."""
    root = tmp_path_factory.mktemp("versions")
    _copy(bundles / "tiny-fm" / "1", root / "tiny-fm" / "1", name="tiny-fm", version=1)
    other = write_log(root / "other.csv", rows=300, seed=7)
    options = Options(artifacts=root, checkpoints=root / ".checkpoints", device="cpu")
    run(check(tiny_recipe(other, "fm"), origin="of the tests"), options)
    _copy(bundles / "ids-only-fm" / "1", root / "tiny-fm" / "3", name="tiny-fm", version=3)
    return root


def copied(bundles: Path, root: Path, model: str, version: int) -> Path:
    """Puts one of the tiny bundles into `root` under a version number of the test's choice."""
    target = root / model / str(version)
    _copy(bundles / model / "1", target, version=version)
    return target


def _copy(bundle: Path, target: Path, **manifest: object) -> None:
    """A bundle under another name and version."""
    shutil.copytree(bundle, target)
    stated = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({**stated, **manifest, "checksum": None}))


@pytest.fixture(scope="module")
def three_served(three_versions: Path) -> Iterator[httpx.Client]:
    with running(create_app(Settings(bundles=three_versions, provider="cpu", admin=True, versions=3))) as client:
        yield client


@pytest.fixture
def publish(bundles: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Puts tiny-fm into `tmp_path` under a version number of the test's choice."""

    def copy(version: int) -> Path:
        return copied(bundles, tmp_path, "tiny-fm", version)

    return copy


@pytest.fixture
def reseal() -> Callable[[Path, str, bytes], None]:
    """Puts another content into a file of a bundle, and what the manifest promises of it with it."""

    def replace(path: Path, name: str, content: bytes) -> None:
        (path / name).write_bytes(content)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["checksum"] = None
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "length": len(content)}
        (path / "manifest.json").write_text(json.dumps(manifest))

    return replace


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., httpx.Client]]:
    """Starts the service over `tmp_path`, where `publish` puts bundles."""
    with ExitStack() as stack:

        def start(**settings: object) -> httpx.Client:
            chosen = Settings.model_validate({"bundles": tmp_path, "provider": "cpu", **settings})
            return stack.enter_context(running(create_app(chosen)))

        yield start


CRASHER = """
import os, sys
if "service.trial" in sys.orig_argv:
    import service.runtime
    load = service.runtime.load
    def abort(path, **how):
        with open(os.environ["TRIED"], "a") as file:
            file.write(f"{path.parent.name}/{path.name}\\n")
        if path.name == os.environ["CRASHES"]:
            os.abort()
        return load(path, **how)
    service.runtime.load = abort
"""


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Lets a version of any model end the process that tries it, as a defect of onnxruntime would: a bundle that does
    so of itself is not known. Returns a file that lists what was tried."""

    def plant(version: int) -> Path:
        site = tmp_path / ".site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(CRASHER)
        monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{Path.cwd()}")
        monkeypatch.setenv("CRASHES", str(version))
        monkeypatch.setenv("TRIED", str(tmp_path / ".tried"))
        return tmp_path / ".tried"

    return plant


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the service logs at debug level, as text."""
    text, service = io.StringIO(), logging.getLogger("service")
    handler = logging.StreamHandler(text)
    handler.setFormatter(logs.JsonLine())
    level = service.level
    service.addHandler(handler)
    service.setLevel("DEBUG")
    yield text
    service.removeHandler(handler)
    service.setLevel(level)
