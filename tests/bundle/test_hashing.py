"""Hashed ids are part of what a trained model is: these literals may never change."""

import json
import os
import subprocess
import sys

import pytest

from bundle import Categorical, Encoder, FeatureSchema
from bundle.schema import FittedField, Hash

VALUES = ["Rome", "", "été", "🦊", 3, "3", True]
BUCKETS = {
    (2**31, 0): [1898348913, 1493151683, 431185570, 1707285366, 477566944, 477566944, 835293835],
    (1000, 2**63 - 1): [703, 420, 330, 888, 529, 529, 417],
}
FIRST_BUCKET = 2  # after padding and missing

IN_ANOTHER_PROCESS = """
import json, sys
from bundle import Encoder, FeatureSchema
schema, values = json.load(sys.stdin)
print(Encoder(FeatureSchema.model_validate(schema), {}).columns({"x": values}).ids[:, 0].tolist())
"""


def hashed(*, buckets: int, seed: int) -> FeatureSchema:
    kind = Categorical(hash=Hash(buckets=buckets, seed=seed))
    return FeatureSchema(fields=(FittedField(name="x", kind=kind, size=1 + buckets),))


@pytest.mark.parametrize(("buckets", "seed"), BUCKETS)
def test_pinned_buckets(buckets: int, seed: int) -> None:
    ids = Encoder(hashed(buckets=buckets, seed=seed), {}).columns({"x": VALUES}).ids[:, 0]
    assert (ids - FIRST_BUCKET).tolist() == BUCKETS[buckets, seed]


def test_another_process_with_another_string_hash() -> None:
    buckets, seed = 1000, 2**63 - 1
    answer = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=json.dumps([hashed(buckets=buckets, seed=seed).model_dump(), VALUES]),
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [each - FIRST_BUCKET for each in json.loads(answer.stdout)] == BUCKETS[buckets, seed]
