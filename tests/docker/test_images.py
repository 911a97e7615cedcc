"""What the Dockerfiles promise: small, non-root, checked for health without curl, and built from what is sent."""

import json
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


class Instruction(NamedTuple):
    name: str
    text: str


def instructions(dockerfile: Path) -> list[Instruction]:
    logical_lines = dockerfile.read_text().replace("\\\n", "").splitlines()
    words = [line.split(maxsplit=1) for line in logical_lines if line and not line.startswith("#")]
    return [Instruction(name, text) for name, text in words]


def result_stage(dockerfile: Path) -> list[Instruction]:
    """The last stage, which becomes the image."""
    everything = instructions(dockerfile)
    return everything[max(at for at, step in enumerate(everything) if step.name == "FROM") :]


def test_there_is_an_image_for_each_program() -> None:
    assert [path.stem for path in DOCKERFILES] == ["service", "training"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
class TestDockerfile:
    def test_bases_are_pinned(self, dockerfile: Path) -> None:
        bases = {step.text.split(" AS ")[0] for step in instructions(dockerfile) if step.name == "FROM"}
        assert bases == {"python:3.11-slim-bookworm"}

    def test_result_runs_nothing_and_copies_only_what_was_built(self, dockerfile: Path) -> None:
        stage = result_stage(dockerfile)
        assert "RUN" not in {step.name for step in stage}
        copies = ["--from=build /opt/factorlens /opt/factorlens"]
        if dockerfile.stem == "service":
            copies.append("--from=build --chown=10001:10001 /var/lib/factorlens /var/lib/factorlens")
        assert [step.text for step in stage if step.name == "COPY"] == copies

    def test_is_not_root(self, dockerfile: Path) -> None:
        (user,) = (step.text for step in result_stage(dockerfile) if step.name == "USER")
        assert re.fullmatch(r"[1-9]\d{4}:[1-9]\d{4}", user)

    def test_starts_without_a_shell(self, dockerfile: Path) -> None:
        starts = [step.text for step in result_stage(dockerfile) if step.name in {"CMD", "ENTRYPOINT"}]
        assert starts[0].startswith('["python", "-m", ')
        assert all(isinstance(json.loads(start), list) for start in starts)

    def test_names_its_stop_signal(self, dockerfile: Path) -> None:
        signals = {"service": "SIGTERM", "training": "SIGINT"}
        (signal,) = (step.text for step in result_stage(dockerfile) if step.name == "STOPSIGNAL")
        assert signal == signals[dockerfile.stem]

    def test_needs_no_tool_and_no_registry(self, dockerfile: Path) -> None:
        text = dockerfile.read_text()
        assert not re.search(r"curl|wget|apt-get|https?://|--(extra-)?index-url", text)
        installs = re.findall(r"pip [^&]*?install (.*)", text.replace("\\\n", ""))
        assert len(installs) == 2
        assert all(
            "--require-hashes -r requirements.lock" in each or "--no-build-isolation ." in each for each in installs
        )
        assert all("--no-deps" in each for each in installs)

    def test_what_it_copies_is_sent_to_the_builder(self, dockerfile: Path) -> None:
        sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
        sent |= {f"docker/{path.name}" for path in LOCKS if "docker/*.lock" in sent}
        copies = [step.text.split() for step in instructions(dockerfile) if step.name == "COPY"]
        sources = {source for copy in copies if "--from=build" not in copy for source in copy[:-1]}
        sources = {source.replace("${RUNTIME}", "cpu") for source in sources}
        assert sources <= sent
        assert all((ROOT / source).exists() for source in sources)


LOCKS = sorted((ROOT / "docker").glob("requirements.*.lock"))


def test_there_is_a_lock_for_each_image() -> None:
    assert [path.suffixes[0] for path in LOCKS] == [".cpu", ".gpu", ".training"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.suffixes[0])
def test_a_lock_has_a_hash_for_everything_and_the_versions_of_the_tests(lock: Path) -> None:
    """And names no registry: where packages come from is pip's to know, what they are is not."""
    text = lock.read_text()
    assert not re.search(r"https?:|index-url|find-links", text)
    known = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().split())
    pinned = re.findall(r"^([a-z0-9-]+)==([^ ;]+).*\\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^[a-z]", text, re.MULTILINE)) > 20
    theirs = {name.replace("_", "-"): version for name, version in known.items()}
    assert [pin for pin in pinned if theirs.get(pin[0], pin[1]) != pin[1]] == []


@pytest.mark.parametrize(
    ("lock", "extras"), [("cpu", ["cpu", "service"]), ("gpu", ["gpu", "service"]), ("training", ["cpu", "training"])]
)
def test_a_lock_has_what_the_program_asks_for(lock: str, extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    names = {re.split(r"[\[<>=;! ]", each)[0].lower() for each in asked}
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / f"docker/requirements.{lock}.lock").read_text(), re.MULTILINE))
    assert names - pinned == set()


def test_service_image_holds_no_training_code() -> None:
    copied = {step.text for step in instructions(ROOT / "docker/service.Dockerfile") if step.name == "COPY"}
    assert not [text for text in copied if "training" in text or "models" in text]


def test_health_check_asks_for_readiness_and_is_valid_python() -> None:
    (check,) = (s.text for s in result_stage(ROOT / "docker/service.Dockerfile") if s.name == "HEALTHCHECK")
    program, flag, code = json.loads(check[check.index("[") :])
    assert (program, flag) == ("python", "-c")
    assert "/readyz" in code
    compile(code, "HEALTHCHECK", "exec")
