"""What is left out stays out: the copy of a fold takes no loss of its rows, and answers them as it would be served."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from models import Layout
from models.crossfit import Crossfit, Folds
from models.ensemble import Member

LAYOUT = Layout(num_features=50, widths=(1, 2, 1), needs_values=True)
NFM: dict[str, Any] = {"embedding_dim": 4, "layers": [6], "batch_norm": True, "dropout": 0.5}
MEMBERS = (Member(key="fm", copies=2, options={"embedding_dim": 4}), Member(key="nfm", options=NFM))
WHOLE, FOLDS = 3, 3


def build(**options: Any) -> Crossfit:
    torch.manual_seed(5)
    model = Crossfit(LAYOUT, Crossfit.Config(**{"members": MEMBERS, "folds": FOLDS, "meta_layers": (8,), **options}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def folds(model: Crossfit) -> list[Folds]:
    return cast("list[Folds]", list(model.folds))


def rows(count: int = 400) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(count)
    ids_BS = torch.randint(1, LAYOUT.num_features, (count, LAYOUT.slots), generator=draw)
    return ids_BS, torch.rand(count, LAYOUT.slots, generator=draw)


def learns(part: nn.Module) -> bool:
    gradients = [parameter.grad for parameter in part.parameters()]
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("own", range(FOLDS))
def test_the_copy_of_a_rows_fold_learns_nothing_of_it_and_everything_else_does(own: int) -> None:
    model, (ids, values) = build().train(), rows()
    at = folds(model)[0].of(ids, values) == own
    model(ids[at], values[at]).square().sum().backward()
    for of_kind in folds(model):
        assert [learns(copy) for copy in of_kind.copies] == [fold != own for fold in range(FOLDS)]
    assert all(learns(part) for part in [*model.members, *model.meta])


def test_a_row_left_out_is_answered_as_served_and_corrected() -> None:
    model, (ids, values) = build().train(), rows()
    for meta in model.meta:
        nn.init.zeros_(meta.h)  # the correction is 0
    found_MB = model(ids, values)
    assert all(module.training for module in model.modules())
    assert found_MB.shape == (WHOLE + 2 * FOLDS, len(ids))
    copies = [copy for of_kind in folds(model) for copy in of_kind.copies]
    model.eval()
    served_MB = torch.stack([copy(ids, values) for copy in copies])
    fold_1B = folds(model)[0].of(ids, values).unsqueeze(0)
    for first in (0, FOLDS):
        place = fold_1B + first
        torch.testing.assert_close(found_MB[WHOLE:].gather(0, place), served_MB.gather(0, place))
    torch.testing.assert_close(found_MB[WHOLE:][:FOLDS], served_MB[:FOLDS])  # an fm is the same in training
    assert not torch.allclose(found_MB[WHOLE:][FOLDS:], served_MB[FOLDS:])


def test_a_network_learns_from_the_rows_left_out_by_its_own_kind() -> None:
    model, (ids, values) = build().train(), rows()
    found_MB = model(ids, values)
    found_MB[:WHOLE].sum().backward(retain_graph=True)
    assert [learns(meta) for meta in model.meta] == [False, False]
    found_MB[WHOLE : WHOLE + FOLDS].sum().backward()
    assert [learns(meta) for meta in model.meta] == [True, False]


def test_folds_are_the_same_for_the_same_row_and_of_about_one_size() -> None:
    (first, second), (ids, values) = folds(build()), rows(9_000)
    found = first.of(ids, values)
    torch.testing.assert_close(second.of(ids.flip(0), values.flip(0)).flip(0), found)
    changed = ids.clone()
    changed[:, 2] = changed[:, 2] % (LAYOUT.num_features - 1) + 1
    alike = ids[:1].expand_as(ids)
    for fold_B in (found, first.of(ids, None), first.of(alike, values)):
        assert torch.bincount(fold_B, minlength=FOLDS).tolist() == pytest.approx([3_000] * FOLDS, rel=0.05)
    for fold_B in (first.of(changed, values), first.of(ids, values + 1)):
        assert (fold_B != found).float().mean() == pytest.approx(2 / 3, abs=0.05)


def test_without_batch_norm_a_copy_learns_nothing_of_its_fold_beside_others() -> None:
    """Features of rows of its own fold alone stay as they are."""
    plain = Member(key="nfm", options={**NFM, "batch_norm": False, "dropout": 0.0})
    model, (_, values) = build(members=(plain,)).train(), rows(12)
    ids = torch.arange(1, 49).view(12, 4)  # no feature twice
    model(ids, values).square().sum().backward()
    (of_kind,) = folds(model)
    fold_B = of_kind.of(ids, values)
    for fold, copy in enumerate(of_kind.copies):
        moved_B = cast("Tensor", copy.embedding.grad)[ids].abs().sum((1, 2)) > 0
        assert torch.equal(moved_B, fold_B != fold)


def test_few_rows_do_not_stop_it() -> None:
    model, (ids, values) = build(), rows(2)
    assert model.train()(ids, values).isfinite().all()


@torch.no_grad()
def test_untrained_it_is_the_ensemble_of_its_members() -> None:
    torch.manual_seed(5)
    model, (ids, values) = Crossfit(LAYOUT, Crossfit.Config(members=MEMBERS)).eval(), rows()
    mean_B = torch.stack([member(ids, values) for member in model.members]).mean(0)
    torch.testing.assert_close(model(ids, values), mean_B)


@torch.no_grad()
def test_what_is_served_has_no_copies_and_says_the_same() -> None:
    model, (ids, values) = build().eval(), rows()
    served = model.served()
    torch.testing.assert_close(served(ids, values), model(ids, values))
    assert not [name for name in served.state_dict() if name.startswith("folds")]
    assert not [name for name in served.tables if name.startswith("folds")]
    assert len(folds(model)) == len(MEMBERS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"folds": 1}, "folds: expected at least 2, each is left out by one copy, got 1"),
        ({"members": (Member(key="lr"),)}, "members.key: expected models with embeddings, got 'lr'"),
        ({"members": ()}, "members: expected at least one"),
        ({"meta_layers": (0,)}, "meta_layers: expected widths of at least 1"),
    ],
)
def test_what_cannot_be_cross_fitted_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build(**options)
