"""Every setting of the service. Flags beat the environment, the environment a file, a file the defaults."""

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from bundle.device import Gpu, Provider
from bundle.signature import SigningRefused, public_keys

PREFIX = "FACTORLENS_"
ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")

Exposure = Literal["public", "key", "off"]


class SettingsRefused(Exception):
    """A setting that is unknown or has no sense; the text is for the person who started the program."""


def _public_keys(given: object) -> object:
    """Keys and files of keys as they were given: the files are read again whenever a bundle is loaded."""
    if not isinstance(given, str):
        return given
    named = tuple(each.strip() for each in given.split(",") if each.strip())
    try:
        public_keys(named)
    except SigningRefused as error:
        raise ValueError(str(error)) from None
    return named


def _origins(given: object) -> object:
    """Origins as browsers send them: no path, no wildcard."""
    if not isinstance(given, str):
        return given
    origins = tuple(each.strip() for each in given.split(",") if each.strip())
    if not all(ORIGIN.fullmatch(each) for each in origins):
        raise ValueError("expected origins such as https://shop.example or http://localhost:3000, separated by commas")
    return origins


def _collector(given: str) -> str:
    """The address without a slash at its end."""
    if not re.match(r"https?://[^/]", given):
        raise ValueError("expected an address such as http://127.0.0.1:4318")
    exporter = None
    with suppress(ModuleNotFoundError):
        exporter = find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    if exporter is None:
        raise ValueError("the packages of the extra otel are missing: pip install -e '.[otel]' in the service's folder")
    return given.rstrip("/")


class Settings(BaseSettings):
    """`max_rows` is the flag `--max-rows`, the variable `FACTORLENS_MAX_ROWS` and the key `max_rows` of the file."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    config: Path | None = Field(default=None, description="a TOML file that holds any of these settings")
    bundles: Path = Field(default=Path("artifacts"), description="the folder of bundles: <bundles>/<model>/<version>")
    host: str = Field(default="127.0.0.1", description="the address to listen on; 0.0.0.0 is every IPv4 address")
    port: int = Field(default=8000, ge=0, le=65535, description="the port to listen on; 0 takes any free one")
    workers: int = Field(
        default=1,
        ge=1,
        le=256,
        description="processes that answer, each with all the models; more than 1 need Linux",
    )
    provider: Provider = Field(
        default="auto",
        description="where graphs run: cuda, tensorrt and cpu are demands (what cannot run is not ready and says why); "
        "auto takes CUDA where it works and the CPU otherwise, and the log says which",
    )
    device: int = Field(
        default=0, ge=0, description="the number of the GPU; of several workers the n-th takes the n-th one from there"
    )
    tf32: bool = Field(
        default=False, description="true lets a GPU multiply with 10 bits of mantissa: logits move by about 0.001"
    )
    cuda_graphs: bool = Field(
        default=False,
        description="true records a run of each batch size on a GPU and replays it; for provider = cuda or auto",
    )
    tensorrt_cache: Path | None = Field(
        default=None,
        description="a folder that this service alone may write to, for the engines and timings of TensorRT; without "
        "it they are built at every load",
    )
    trusted_keys: Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_public_keys)] = Field(
        default=None,
        description="public keys (python -m training keygen), or files of them, separated by commas; where there are "
        "any, only bundles that one of them signed are served",
    )
    threads: int = Field(default=1, ge=1, description="threads onnxruntime may use inside one run of a graph")
    versions: int = Field(default=2, ge=1, description="how many good versions of a model to load, newest first")
    state: Path | None = Field(
        default=None,
        description="a folder that this service alone may write to: what serves, the default versions and what was "
        "refused are kept there over a restart",
    )
    watch: float = Field(
        default=0,
        ge=0,
        le=86_400,
        description="seconds from one look at the folder of bundles to the next: new versions are loaded, those that "
        "left it are unloaded; 0 looks at the start alone",
    )
    trials: Literal["always", "later", "never"] = Field(
        default="always",
        description="what is loaded in a process of its own first, so that a bundle that crashes takes nothing along: "
        "always every version, later all but those at the start, never none",
    )
    max_rows: int = Field(default=4096, ge=1, description="instances that one predict or explain may hold")
    max_candidates: int = Field(default=100_000, ge=1, description="candidates that one rank may hold")
    max_arrow_rows: int = Field(default=100_000, ge=1, description="rows that the Arrow stream of one predict may hold")
    max_value_length: int = Field(default=1024, ge=1, description="letters that a value of a field may have")
    max_body_bytes: int = Field(default=16 * 2**20, ge=1, description="bytes that the body of a request may have")
    header_timeout: float = Field(
        default=5.0,
        ge=1,
        le=3600,
        description="seconds in which the head of a request has to arrive, and before it the handshake of TLS",
    )
    body_timeout: float = Field(
        default=10.0,
        ge=1,
        le=3600,
        description="seconds in which the body of a request has to arrive, and an answer has to be read",
    )
    deadline: float = Field(
        default=5.0,
        gt=0,
        description="seconds from its head in which a request for scores has to be at work, or it is answered with a "
        "503; its header X-Request-Timeout-Ms may say otherwise",
    )
    max_queue_rows: int = Field(
        default=1_000_000, ge=1, description="rows that may wait or run in each worker before requests are turned away"
    )
    lame_duck: float = Field(
        default=3.0,
        ge=0,
        le=3600,
        description="seconds that go on being served after SIGTERM, while /readyz is a 503 and every answer closes its "
        "connection, so that clients can leave; 0 stops at once",
    )
    top_k: int = Field(default=10, ge=1, description="pairs an explanation and candidates a ranking shows")
    max_candidate_sets: int = Field(default=100, ge=0, description="candidate sets that may be kept, of all models")
    max_candidate_set_bytes: int = Field(
        default=256 * 2**20, ge=0, description="bytes that all candidate sets may take in each worker, encoded, too"
    )
    admin: bool = Field(
        default=False, description="true lets requests change what is served: from this machine, or with admin_key"
    )
    admin_key: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="the key that such requests then have to give, wherever they are from; best as a variable",
    )
    api_keys: str | None = Field(
        default=None,
        min_length=1,
        description="a file of API keys (python -m service keygen), or its lines separated by semicolons; where there "
        "is one, every request but those for health needs a key",
    )
    docs: Exposure = Field(
        default="key",
        description="who may read /docs and /openapi.json: public is anybody; key is whoever has one, or anybody where "
        "there are no keys; off is nobody",
    )
    metrics: Exposure = Field(default="key", description="who may read /metrics: public, key or off, as for docs")
    cors_origins: Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_origins)] = Field(
        default=None,
        description="origins, such as https://shop.example, separated by commas, whose web pages may read answers in a "
        "browser; without any no page of another origin may",
    )
    tls_cert: Path | None = Field(
        default=None,
        description="a PEM file of the certificate, and of those between it and a root: then the service speaks HTTPS",
    )
    tls_key: Path | None = Field(
        default=None, description="a PEM file of the certificate's key, where it is not in the same file"
    )
    hardened: bool = Field(
        default=False,
        description="true refuses to start as root, with capabilities, without no-new-privileges, or with a root file "
        "system that can be written to; false says at the start which of them hold",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="debug, info, warning or error: the least level to log; a request that is refused or fails is a "
        "line at info, any other at debug",
    )
    server_timing: bool = Field(
        default=False, description="true says in a header of each answer how long which stage of the request took"
    )
    otlp_endpoint: Annotated[str, AfterValidator(_collector)] | None = Field(
        default=None,
        description="the http or https address of an OpenTelemetry collector (OTLP), which then gets a trace of each "
        "request; needs the packages of the extra otel",
    )

    @property
    def scheme(self) -> str:
        return "http" if self.tls_cert is None else "https"

    @property
    def gpu(self) -> Gpu:
        return Gpu(self.device, tf32=self.tf32, cuda_graphs=self.cuda_graphs, tensorrt_cache=self.tensorrt_cache)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = init_settings().get("config") or env_settings().get("config")
        in_file = InitSettingsSource(settings_cls, _read(Path(path)) if path else {})
        return init_settings, env_settings, in_file


def load(arguments: Sequence[str]) -> Settings:
    """The settings of one start of the program. Raises SettingsRefused; `--help` prints them all and exits."""
    try:
        return Settings.model_validate(_flags(arguments))
    except ValidationError as error:
        raise SettingsRefused("\n".join(_sentence(str(e["loc"][0]), _said(e)) for e in error.errors())) from None


def check_bundles(chosen: Settings) -> None:
    """Raises SettingsRefused where there is no folder of bundles at all: one that is empty may be filled later."""
    there = True
    with suppress(OSError):  # what cannot be looked at is told when it is read
        there = chosen.bundles.is_dir()
    if not there:
        hint = (
            "python -m training fit writes one, artifacts unless told otherwise, and python -m training demo an example"
        )
        raise SettingsRefused(_sentence("bundles", f"there is no folder {str(chosen.bundles)!r}; {hint}"))


def one_for_each_gpu(chosen: Settings, gpus: int) -> Settings:
    """The settings under which no two workers share a GPU: `auto` then takes the CPU for all of them.

    Raises SettingsRefused where GPUs are a demand.
    """
    if chosen.device + chosen.workers <= gpus:
        return chosen
    if chosen.provider == "auto":
        return chosen.model_copy(update={"provider": "cpu"})
    raise SettingsRefused(
        f"workers (--workers): expected at most {max(gpus - chosen.device, 1)} with provider = {chosen.provider}, one "
        f"for each GPU from number {chosen.device} on; received {chosen.workers}"
    )


def unknown_variables() -> list[str]:
    """A sentence for each variable of the environment that looks like a setting and is none."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    looking = [name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known]
    return [f"{name} is no setting{_nearest(name.upper(), known)}" for name in sorted(looking)]


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve the bundles in a folder over HTTP. python -m service bench measures a model that is served, "
        "python -m service keygen makes an API key: each has a --help of its own.",
        epilog=f"A flag beats the environment ({PREFIX}MAX_ROWS), which beats the file, which beats the default.",
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        help_text = f"{field.description} (default: {'none' if field.default is None else field.default})"
        nargs, const = ("?", "true") if field.annotation is bool else (None, None)
        parser.add_argument(_flag(name), dest=name, help=help_text, default=argparse.SUPPRESS, nargs=nargs, const=const)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0]  # a value may be a secret
        nearest = _nearest(name, [_flag(each) for each in Settings.model_fields])
        raise SettingsRefused(f"{name} is no flag{nearest}")
    return vars(given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsRefused(f"the settings file {str(path)!r} cannot be read: {error}") from None


def _sentence(name: str, problem: str) -> str:
    if name in Settings.model_fields:
        return f"{name} ({_flag(name)}, {PREFIX}{name.upper()}, or a key of the file): {problem}"
    return f"the settings file: {name} is no setting{_nearest(name, Settings.model_fields)}"


def _said(error: ErrorDetails) -> str:
    return "expected true or false" if error["type"] in {"bool_parsing", "bool_type"} else error["msg"]


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""
