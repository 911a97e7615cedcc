"""Hiding values in training. Schema: a categorical, a multi, a hashed and a numeric field; six slots."""

import pytest
import torch
from torch import Tensor

from bundle import Categorical, FeatureSchema, Multi, Numeric
from bundle.schema import FittedField, Hash
from training.dataset import Batch
from training.masking import Masking
from training.recipe import Fit

SCHEMA = FeatureSchema(
    fields=(
        FittedField(name="user", kind=Categorical(), size=10),
        FittedField(name="tags", kind=Multi(max_len=3), size=8),
        FittedField(name="app", kind=Categorical(hash=Hash(buckets=5)), size=6),
        FittedField(name="age", kind=Numeric(), size=2),
    )
)
USER, TAGS, APP, AGE = SCHEMA.starts
ROWS = 20_000
FULL_ROW = [USER + 4, TAGS + 2, TAGS + 3, 0, APP + 2, AGE + 1]
FULL_VALUES = [1.0, 0.5, 0.5, 0.0, 1.0, -1.3]
MISSING_ROW = [USER, TAGS, 0, 0, APP, AGE]


def mask(row: list[int], values: list[float], *, seed: int = 1, **shares: float) -> tuple[Tensor, Tensor]:
    settings = Fit(**{"unknown_share": 0.0, **shares})
    masking = Masking(SCHEMA, settings, torch.device("cpu"))
    torch.manual_seed(seed)
    batch = masking.apply(rows(torch.tensor([row]).repeat(ROWS, 1), torch.tensor([values]).repeat(ROWS, 1)))
    assert batch.values is not None
    return batch.ids, batch.values


def rows(ids: Tensor, values: Tensor | None) -> Batch:
    return Batch(ids, values, labels=torch.zeros(len(ids)), weights=None)


def test_a_share_of_single_values_becomes_unknown() -> None:
    ids, values = mask(FULL_ROW, FULL_VALUES, unknown_share=0.1)
    unknown = torch.tensor([USER + 1, TAGS + 1, TAGS + 1, -1, -1, -1])
    hidden = ids == unknown
    assert hidden.float().mean(0).tolist() == pytest.approx([0.1, 0.1, 0.1, 0, 0, 0], abs=0.01)
    assert (hidden[:, 1] & hidden[:, 2]).float().mean() == pytest.approx(0.01, abs=0.004), "values fall together"
    assert torch.equal(torch.where(hidden, torch.tensor(FULL_ROW), ids), torch.tensor([FULL_ROW]).repeat(ROWS, 1))
    assert torch.equal(values, torch.tensor([FULL_VALUES]).repeat(ROWS, 1))


def test_a_share_of_fields_becomes_missing() -> None:
    ids, values = mask(FULL_ROW, FULL_VALUES, missing_share=0.2)
    gone = ids == torch.tensor([USER, TAGS, 0, 0, APP, AGE])
    assert gone[:, [0, 1, 4, 5]].float().mean(0).tolist() == pytest.approx([0.2] * 4, abs=0.01)
    missing, kept = ids[:, 1] == TAGS, ids[:, 1] == TAGS + 2
    assert torch.all(missing | kept)
    assert torch.all(ids[missing, 1:4] == torch.tensor([TAGS, 0, 0]))
    assert torch.all(values[missing, 1:4] == torch.tensor([1.0, 0.0, 0.0]))
    assert torch.all(ids[kept, 1:4] == torch.tensor(FULL_ROW[1:4]))
    assert torch.all(values[kept, 1:4] == torch.tensor(FULL_VALUES[1:4]))
    assert torch.all(values[ids[:, 5] == AGE, 5] == 1.0), "a missing number has value 1"


def test_padding_and_what_is_missing_stay_as_they_are() -> None:
    ids, values = mask(MISSING_ROW, [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], unknown_share=0.5, missing_share=0.5)
    assert torch.equal(ids, torch.tensor([MISSING_ROW]).repeat(ROWS, 1))
    assert torch.equal(values, torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]).repeat(ROWS, 1))


def test_the_same_seed_hides_the_same_and_no_share_hides_nothing() -> None:
    first, again, other = (mask(FULL_ROW, FULL_VALUES, unknown_share=0.1, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    ids, _ = mask(FULL_ROW, FULL_VALUES)
    assert torch.all(ids == torch.tensor(FULL_ROW))


def test_rows_of_ids_alone_stay_so() -> None:
    schema = FeatureSchema(fields=SCHEMA.fields[:1])
    masking = Masking(schema, Fit(unknown_share=0.5, missing_share=0.25), torch.device("cpu"))
    ids, values, *_ = masking.apply(rows(torch.full((ROWS, 1), USER + 4), None))
    assert values is None
    shares = [(ids == USER + offset).float().mean().item() for offset in (0, 1, 4)]
    assert shares == pytest.approx([0.25, 0.375, 0.375], abs=0.02)
