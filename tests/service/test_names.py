"""Names and paths in requests lead nowhere: a corpus of traversals against every address that has a parameter."""

import ast
import asyncio
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import service
from service.app import Service, create_app
from service.settings import Settings

SECRET = "the-secret-outside-of-the-folder"
TARGETS = ("secret", "etc/passwd", "tiny-fm/1/manifest.json", "proc/self/environ")
UPS = ("../", "../../", "../../../../../../../../", "..\\", "....//", "..;/", "./.././", "..%2f", "..%5c", "%2e%2e/")
WHOLE = (
    "/{0}", "//{0}", "///{0}", "\\\\host\\{0}", "C:\\{0}", "file:///{0}", "file:{0}", "http://127.0.0.1:1/{0}",
    "//127.0.0.1:1/{0}", "~/{0}", "~root/{0}", "$HOME/{0}", "${{HOME}}/{0}", "`cat /{0}`", "|cat /{0}", ";cat /{0}",
    "tiny-fm/../../{0}", "tiny-fm\\..\\..\\{0}", "tiny-fm/./1/{0}", "tiny-fm\x00/../../{0}", "{0}\x00", "\x00{0}",
    "../{0}\x00.json", "..\u2215{0}", "..\uff0f{0}", "\uff0e\uff0e/{0}", "..\u2216{0}", "%c0%ae%c0%ae/{0}",
    "..%c0%af{0}", "..%252f{0}", "%252e%252e%252f{0}", "..%25252f{0}", "..%u2215{0}", "\r\n{0}", "{0}\n", " {0} ",
    "\t{0}", "{0}?x=1", "{0}#x", "{0}:predict", "{0}/versions/1", "*{0}", "[{0}]", "{{0}}", "%s%n{0}", "{0}" * 50,
)  # fmt: skip
PLAIN = (
    "", ".", "..", "...", "%", "%00", "%2", "/", "//", "\\", "\x00", "\x7f", "\ud7ff", "\U0010ffff", "\u202e",
    "tiny-fm ", "TINY-FM", "tiny-fm\n", "tiny-fm/", "tiny-fm.", "tiny-fm::$DATA", "CON", "1", "-1", "01", "1.0", "1e0",
    "\u0661", "9" * 400, "9" * 5000, "a" * 3000, "../" * 1000, "\u00e9" * 600, "stats", "index", "candidate-sets",
)  # fmt: skip
CORPUS = [
    *(up + target for up in UPS for target in TARGETS),
    *(form.replace("{0}", target) for form in WHOLE for target in TARGETS),
    *PLAIN,
]


@pytest.fixture(scope="module")
def folder(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles, with a secret beside it."""
    outside = tmp_path_factory.mktemp("outside")
    for name in ("secret", "passwd"):
        (outside / name).write_text(SECRET)
    (outside / "bundles").mkdir()
    (outside / "bundles" / "tiny-fm").symlink_to(bundles / "tiny-fm")
    return outside / "bundles"


class Touched:
    """Files that were opened or listed while `watching`; an audit hook stays for the life of the process."""

    def __init__(self) -> None:
        self.on, self.paths = False, set[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in {"open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir"}:
            self.paths.add(str(arguments[0]))

    @contextmanager
    def watching(self) -> Iterator[set[str]]:
        self.paths.clear()
        self.on = True
        try:
            yield self.paths
        finally:
            self.on = False


@pytest.fixture(scope="module")
def touched() -> Touched:
    return Touched()


PARAMETERS = {"model": "tiny-fm", "version": "1", "name": "some"}
BODIES = {
    "predict": {"instances": [{}]},
    "explain": {"instances": [{}]},
    "rank": {"context": {}, "candidates": [{"app": "a1"}]},
    "infer": {"inputs": [{"name": "age", "datatype": "FP64", "shape": [1], "data": [3.5]}]},
}
OURS = (str(Path(service.__file__).parents[1]), sys.prefix, sys.base_prefix)


def addresses(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(method, address, parameter) of everything that has a parameter in its address."""
    return [
        (method.upper(), path, name)
        for path, methods in document["paths"].items()
        for method in methods
        for name in re.findall(r"{(\w+)}", path)
    ]


def filled(address: str, **names: str) -> str:
    return re.sub(r"{(\w+)}", lambda found: (PARAMETERS | names)[found[1]], address)


def body(method: str, path: str) -> bytes:
    verb = re.split("[:/]", path)[-1]
    if method == "PUT":
        return json.dumps({"candidates": [{"app": "a1"}]}).encode()
    return json.dumps(BODIES.get(verb, {})).encode() if method == "POST" else b""


async def ask(app: Service, method: str, path: str, content: bytes) -> tuple[int, bytes]:
    """As uvicorn would: the path is decoded already."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": quote(path).encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-length", b"%d" % len(content))],
        "client": ("127.0.0.1", 1),
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def outside(paths: set[str], folder: Path) -> set[str]:
    """Of what was touched whatever is neither in the folder of bundles nor part of the program."""
    real = str((folder / "tiny-fm").resolve())
    own = (str(folder), real, *OURS)
    return {path for path in paths if not any(path == each or path.startswith(f"{each}/") for each in own)}


def test_the_corpus_is_large() -> None:
    assert len(set(CORPUS)) == len(CORPUS) >= 250


def test_no_name_leads_anywhere(folder: Path, touched: Touched) -> None:
    app = create_app(Settings(bundles=folder, provider="cpu", admin=True, max_candidate_sets=10_000))
    found = addresses(app.openapi())
    assert len(found) > 30

    async def all_of_them() -> dict[int, int]:
        statuses: dict[int, int] = {}
        async with app.router.lifespan_context(app):
            for method, address, _ in found:
                if not address.endswith("load"):
                    assert (await ask(app, method, filled(address), body(method, address)))[0] < 500
            with touched.watching() as paths:
                for method, address, name in found:
                    for value in CORPUS:
                        path = filled(address, **{name: value})
                        status, said = await ask(app, method, path, body(method, address))
                        assert status < 500, (method, path)
                        assert SECRET.encode() not in said
                        if status >= 400 and len(value) > 12:
                            assert value.encode() not in said, (method, path)
                        statuses[status] = statuses.get(status, 0) + 1
                assert (await ask(app, "POST", "/v2/repository/models/tiny-fm/load", b"{}"))[0] == 200
                assert outside(paths, folder) == set()
                assert any(path.startswith(str(folder)) for path in paths)  # the control: what a load reads is seen
            assert (await ask(app, *GOOD))[0] == 200
        return statuses

    statuses = asyncio.run(all_of_them())
    assert sum(statuses.values()) == len(found) * len(CORPUS)
    assert statuses[404] > 0.8 * sum(statuses.values())


GOOD = ("POST", "/v1/models/tiny-fm:predict", b'{"instances": [{}]}')


TAILS = (
    "\n",
    "\r\n",
    "%0a",
    "/",
    "//",
    "/.",
    "/..",
    "/../..",
    "\x00",
    ";x",
    "\\",
    " ",
    ":predict",
    "/infer",
    "\u2028",
    "#",
    "?",
)


def test_no_address_goes_on(folder: Path) -> None:
    """Whatever follows an address is another address. A `$` would let a newline pass."""
    app = create_app(Settings(bundles=folder, provider="cpu", admin=True))

    async def all_of_them() -> None:
        async with app.router.lifespan_context(app):
            for path, methods in app.openapi()["paths"].items():
                for method in map(str.upper, methods):
                    for tail in TAILS:
                        asked = filled(path) + tail
                        status, _ = await ask(app, method, asked, body(method, path))
                        assert 400 <= status < 500, (method, asked, status)

    asyncio.run(all_of_them())


def test_no_parameter_is_an_address_or_a_path() -> None:
    document = create_app(Settings(admin=True)).openapi()
    parameters = {
        (each["in"], each["name"])
        for methods in document["paths"].values()
        for operation in methods.values()
        for each in operation.get("parameters", [])
    }
    assert {name for place, name in parameters if place == "path"} >= set(PARAMETERS)
    taken = {name for _, name in parameters} | set(keys_of_bodies(document))
    assert {"instances", "columns", "candidate_set", "inputs"} <= taken
    suspicious = re.compile(r"ur[il]|path|file|folder|dir|href|link|host|address|callback|shared_memory", re.IGNORECASE)
    assert sorted(name for name in taken if suspicious.search(name)) == []


def keys_of_bodies(document: dict[str, Any]) -> Iterator[str]:
    """Every key that the body of a request may have, however deep."""
    seen: set[str] = set()
    waiting = [
        content["schema"]
        for methods in document["paths"].values()
        for operation in methods.values()
        for content in operation.get("requestBody", {}).get("content", {}).values()
    ]
    while waiting:
        schema = waiting.pop()
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if isinstance(reference, str):
            if reference not in seen and reference.startswith("#/components"):
                seen.add(reference)
                waiting.append(document["components"]["schemas"][reference.rpartition("/")[2]])
            continue
        if isinstance(schema, dict):
            yield from schema.get("properties", {})
            waiting += [each for each in schema.values() if isinstance(each, dict | list)]
        elif isinstance(schema, list):
            waiting += schema


CLIENTS = {"urllib.request", "http.client", "httpx", "requests", "aiohttp", "ftplib", "smtplib", "xmlrpc.client"}


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=names):
                found |= {name.name for name in names}
            case ast.ImportFrom(module=str(module), names=names):
                found |= {module, *(f"{module}.{name.name}" for name in names)}
    return found


def test_the_service_asks_nobody() -> None:
    """No module of it can fetch anything, but for the benchmark, which is a program of its own."""
    files = sorted(Path(service.__file__).parent.rglob("*.py"))
    asking = {str(file.relative_to(Path(service.__file__).parent)) for file in files if imports(file) & CLIENTS}
    assert asking == {"bench/requests.py"}


def test_names_over_a_socket(
    folder: Path, started: Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]
) -> None:
    """The same where uvicorn decodes the path: as bytes, as they are and quoted once and twice."""
    with started("--bundles", str(folder), "--admin", "true") as (_, url):
        host, port = url.removeprefix("http://").split(":")
        with (
            socket.create_connection((host, int(port)), timeout=10) as connection,
            connection.makefile("rb") as answers,
        ):
            for method, address in (
                ("GET", "/v1/models/{model}"),
                ("POST", "/v1/models/{model}:predict"),
                ("POST", "/v2/repository/models/{model}/load"),
            ):
                for value in CORPUS:
                    for written in (
                        quote(value, safe=""),
                        quote(value, safe="/%"),
                        quote(quote(value, safe=""), safe=""),
                    ):
                        path = address.replace("{model}", written[:8000])
                        sent = f"{method} {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{{}}"
                        connection.sendall(sent.encode())
                        status, said = answer(answers)
                        assert status in {404, 405, 400, 414}, (path, status)
                        assert SECRET.encode() not in said


def answer(answers: Any) -> tuple[int, bytes]:
    status = int(answers.readline().split()[1])
    length = 0
    while (line := answers.readline().strip()) != b"":
        name, _, value = line.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return status, answers.read(length)


def test_an_escape_would_be_seen(folder: Path, touched: Touched) -> None:
    with touched.watching() as paths:
        assert (folder / "../secret").read_text() == SECRET
    assert outside(paths, folder.resolve()) or outside({str(Path(each).resolve()) for each in paths}, folder)
