"""How long a vocabulary of 10⁷ values takes to save, load and turn into an encoder, and how much memory.

python benchmarks/vocabulary.py [--values 10000000]
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bundle import Categorical, Encoder, FeatureSchema, vocabulary
from bundle.schema import FittedField
from bundle.vocabulary import Vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=10_000_000)
    count = parser.parse_args().values
    schema = FeatureSchema(fields=(FittedField(name="user", kind=Categorical(), size=2 + count),))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.npz"
        with timed("build"):
            built = Vocabulary.of(f"user-{number}" for number in range(count))
        with timed("save"):
            vocabulary.save(file, {0: built})
        size = file.stat().st_size
        del built
        with timed("load"):
            loaded = vocabulary.load(file)
    with timed("encoder"):
        encoder = Encoder(schema, {"user": loaded[0]})
    encoded = encoder.columns({"user": [f"user-{count - 1}", "nobody"]})
    assert encoded.ids[:, 0].tolist() == [2 + count, 2]
    print(f"{count:,} values, {size / 2**20:,.0f} MiB on disk, peak memory {peak_mib():,.0f} MiB")


@contextmanager
def timed(step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"{step:8} {time.perf_counter() - started:6.2f} s")


def peak_mib() -> float:
    """The largest resident set of this process; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
