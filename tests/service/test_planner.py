"""What becomes of wishes that come at once, without a process."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from service import folder, memory, trials
from service.control import ChangeModel, Command, Serve, Versions
from service.planner import Planner
from service.settings import Settings
from service.trials import Candidate, Verdict
from service.vetting import Vetting

ROOM = 1000


def published(bundles: Path, model: str, *versions: str) -> dict[str, str]:
    """Folders with what the planner reads of them: the digests of the versions, highest first."""
    for version in versions:
        (bundles / model / version).mkdir(parents=True)
        (bundles / model / version / "manifest.json").write_text(version)
    return folder.versions(bundles, model)


@pytest.fixture
def _trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are good, and take 400 bytes beside their files."""

    async def run(_: Settings, candidates: Sequence[Candidate], room: int | None) -> list[Verdict]:
        return [Verdict(None, grown=400)] * len(candidates)

    monkeypatch.setattr(trials, "run", run)
    monkeypatch.setattr(memory, "room", lambda: ROOM)


@pytest.mark.usefixtures("_trials")
def test_two_quarantines_at_once_leave_what_the_folder_has(tmp_path: Path) -> None:
    digests = published(tmp_path, "tiny-fm", "1", "2", "3")
    planner, one_by_one = Planner(Settings(bundles=tmp_path), AsyncMock()), asyncio.Lock()
    planner.keep({"tiny-fm": Versions({version: digests[version] for version in "32"}, {})})

    async def everywhere(plan: Callable[[], Command]) -> None:
        async with one_by_one:
            await asyncio.sleep(0.01)
            serve = plan()
            assert isinstance(serve, Serve)
            planner.keep({"tiny-fm": serve.versions})

    async def quarantine() -> None:
        wishes = [ChangeModel("quarantine", "tiny-fm", version, "it fails") for version in (3, 2)]
        await asyncio.gather(*(planner.carry_out(wish, everywhere) for wish in wishes))

    asyncio.run(quarantine())
    assert planner.inventory["tiny-fm"].serving == {"1": digests["1"]}
    assert list(planner.inventory["tiny-fm"].rejected) == ["3", "2"]


@pytest.mark.usefixtures("_trials")
def test_room_is_kept_for_what_is_yet_to_be_opened(tmp_path: Path) -> None:
    vetting = Vetting(Settings(bundles=tmp_path), lambda _: False)
    one, other = (Candidate(name, "1", published(tmp_path, name, "1")["1"]) for name in ("tiny-fm", "tiny-lr"))

    async def is_good(candidate: Candidate) -> bool:
        tried = await vetting.run(lambda tried: [] if candidate in tried else [candidate])
        return tried[candidate] is None

    async def verdicts() -> list[bool]:
        found = [await is_good(one), await is_good(other)]
        vetting.release([one])
        return [*found, await is_good(other)]

    assert asyncio.run(verdicts()) == [True, False, True]
