from pathlib import Path

import pytest

from bundle.device import Gpu
from service import __main__, settings
from service.settings import Settings, SettingsRefused


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "service.toml"
    path.write_text('port = 1\nthreads = 1\nversions = 5\nbundles = "from-file"\n')
    return path


def test_flags_beat_the_environment_which_beats_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORLENS_PORT", "2")
    monkeypatch.setenv("FACTORLENS_THREADS", "2")
    monkeypatch.setenv("FACTORLENS_VERSIONS", "")
    chosen = settings.load(["--config", str(file), "--port=3"])
    assert (chosen.port, chosen.threads, chosen.versions, chosen.max_rows) == (3, 2, 5, 4096)
    assert chosen.bundles == Path("from-file")


def test_the_environment_can_name_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORLENS_CONFIG", str(file))
    assert settings.load([]).versions == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot", "1"], "did you mean --port?"),
        (["artifacts"], "artifacts is no flag"),
        (["--port", "http"], "FACTORLENS_PORT"),
        (["--port", "65536"], "--port"),
        (["--provider", "gpu"], "'cuda'"),
        (["--max-rows", "0"], "--max-rows"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--admin", "si"], "a key of the file): expected true or false"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsRefused) as refused:
        settings.load(arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "on"])
def test_what_is_true_may_be_said_in_several_ways(text: str, file: Path) -> None:
    assert settings.load(["--admin", text]).admin
    assert settings.load(["--admin", "--hardened"]).hardened
    assert settings.load(["--admin", "--port", "1"]).admin
    file.write_text(f'admin = "{text}"\ntf32 = 1\nhardened = true')
    chosen = settings.load(["--config", str(file)])
    assert (chosen.admin, chosen.tf32, chosen.hardened) == (True, True, True)


def test_a_folder_of_bundles_that_is_not_there_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["--bundles", str(tmp_path / "nothere")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("bundles (--bundles, FACTORLENS_BUNDLES, or a key of the file): there is no folder '")
    assert "nothere'; python -m training fit writes one" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("content", "message"), [("prot = 1", "did you mean port?"), ("port", "cannot be read")])
def test_a_bad_file_is_refused(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(SettingsRefused) as refused:
        settings.load(["--config", str(file)])
    assert message in str(refused.value)


def test_a_variable_that_is_no_setting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORLENS_PORTS", "1")
    assert "FACTORLENS_PORTS is no setting; did you mean FACTORLENS_PORT?" in settings.unknown_variables()


def test_every_setting_is_explained_by_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings.load(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in printed
        assert field.description
        assert field.description in printed
    assert "python -m service bench" in printed
    assert "python -m service keygen" in printed


@pytest.mark.parametrize(("workers", "device", "gpus"), [(2, 0, 2), (2, 2, 4), (1, 0, 1)])
def test_every_worker_has_a_gpu_of_its_own(workers: int, device: int, gpus: int) -> None:
    chosen = Settings(workers=workers, device=device, provider="cuda")
    assert settings.one_for_each_gpu(chosen, gpus) == chosen


@pytest.mark.parametrize(("workers", "device", "gpus", "most"), [(2, 0, 0, 1), (3, 0, 2, 2), (2, 3, 4, 1)])
def test_more_workers_than_gpus_are_refused_or_take_the_cpu(workers: int, device: int, gpus: int, most: int) -> None:
    for provider in ("cuda", "tensorrt"):
        with pytest.raises(SettingsRefused, match=f"expected at most {most} with provider = {provider}"):
            settings.one_for_each_gpu(Settings(workers=workers, device=device, provider=provider), gpus)
    auto = settings.one_for_each_gpu(Settings(workers=workers, device=device), gpus)
    assert (auto.provider, auto.workers) == ("cpu", workers)


def test_what_a_gpu_is_asked_for() -> None:
    chosen = settings.load(["--device", "1", "--tf32", "true", "--tensorrt-cache", "/cache"])
    assert chosen.gpu == Gpu(1, tf32=True, cuda_graphs=False, tensorrt_cache=Path("/cache"))
    assert Settings().gpu == Gpu()
