"""What the Dockerfiles promise: small, non-root, checked for health without curl, and built from what is sent."""

import json
import re
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
        assert [step.text for step in stage if step.name == "COPY"] == ["--from=build /opt/factorlens /opt/factorlens"]

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
        assert "-c constraints.txt" in text

    def test_what_it_copies_is_sent_to_the_builder(self, dockerfile: Path) -> None:
        sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
        copies = [step.text.split() for step in instructions(dockerfile) if step.name == "COPY"]
        sources = {source for copy in copies if "--from=build" not in copy for source in copy[:-1]}
        assert sources <= sent
        assert all((ROOT / source).exists() for source in sources)


def test_service_image_holds_no_training_code() -> None:
    copied = {step.text for step in instructions(ROOT / "docker/service.Dockerfile") if step.name == "COPY"}
    assert not [text for text in copied if "training" in text or "models" in text]


def test_health_check_asks_for_readiness_and_is_valid_python() -> None:
    (check,) = (s.text for s in result_stage(ROOT / "docker/service.Dockerfile") if s.name == "HEALTHCHECK")
    program, flag, code = json.loads(check[check.index("[") :])
    assert (program, flag) == ("python", "-c")
    assert "/readyz" in code
    compile(code, "HEALTHCHECK", "exec")
