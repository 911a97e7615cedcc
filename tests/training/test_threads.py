"""Choosing a thread count by trying."""

from collections.abc import Callable

import pytest
import torch

from training import threads
from training.errors import DataError
from training.fit import Run, fit
from training.threads import choose_threads

Prepare = Callable[..., Run]


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 1.0, 2: 0.6}, 2),
        ({1: 1.0, 2: 0.97}, 1),
        ({1: 1.0, 2: 1.4}, 1),
        ({1: 1.0, 2: 0.6, 4: 0.59}, 2),
        ({1: 1.0, 2: 0.6, 4: 0.4}, 4),
    ],
)
def test_the_fewest_threads_that_are_as_fast(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], chosen: int
) -> None:
    monkeypatch.setattr(threads, "_seconds_of_steps", lambda run, counts: {count: seconds[count] for count in counts})
    monkeypatch.setattr(threads, "_cores", lambda: max(seconds))
    assert choose_threads(prepare(), resume=False) == chosen


def test_trying_changes_neither_the_run_nor_torch(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    monkeypatch.setattr(threads, "ROUNDS", 2)
    monkeypatch.setattr(threads, "ROUND_SECONDS", 0.001)
    model = {"key": "nfm", "batch_norm": True, "dropout": 0.2}
    torch.manual_seed(5)
    state, plain = torch.get_rng_state(), fit(prepare(model=model, epochs=1), resume=False)
    torch.set_rng_state(state)
    run = prepare(model=model, epochs=1)
    assert choose_threads(run, resume=False) in (1, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 1
    tried = fit(run, resume=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), tried.model.parameters(), strict=True))


def test_a_resumed_run_keeps_its_threads(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(epochs=1)
    fit(run, resume=False)
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    monkeypatch.setattr(threads, "_seconds_of_steps", lambda run, counts: {1: 1.0, 2: 0.1})
    assert choose_threads(run, resume=True) == 1
    assert choose_threads(run, resume=False) == 2


def test_one_training_row_is_refused_and_not_waited_for(
    prepare: Prepare, liking: Callable[..., dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    with pytest.raises(DataError, match="training needs at least 2 rows"):
        choose_threads(prepare(liking(1)), resume=False)
