"""A file that cannot be trained on is one sentence at the command line: file, row and column, and no traceback."""

import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.cli import main
from training.errors import DataError
from training.sources import open_source

HEADER = "clicked,user,app"
ROWS = [f"{(n % 7 + n % 11) % 2},u{n % 7},a{n % 11}" for n in range(60)]
BOMB_ROWS = 1_000_000


def text(*lines: str) -> bytes:
    return "\n".join(lines).encode()


def with_row(row: str) -> bytes:
    """The row as line 31."""
    return text(HEADER, *ROWS[:29], row, *ROWS[29:])


BROKEN = {
    "a short row": (with_row("1,u1"), "line 31: expected 3 cells, as in the header, got 2: ['1', 'u1']"),
    "a long row": (with_row("1,u1,a1,x"), "line 31: expected 3 cells, as in the header, got 4"),
    "an open quote": (with_row('1,"u1,a1'), "line 31: a quote is not closed"),
    "no UTF-8": (with_row("1,u\0,a1").replace(b"\0", b"\xff"), "line 31, column 'user': expected text in UTF-8"),
    "a label missing": (with_row(",u1,a1"), "line 31, column 'clicked': expected a finite number, got nothing"),
    "a label of words": (with_row("yes,u1,a1"), "line 31, column 'clicked': expected a number, got 'yes'"),
    "a label too large": (with_row("1e999,u1,a1"), "line 31, column 'clicked': expected a finite number, got '1e999'"),
    "a label out of range": (
        with_row("5,u1,a1"),
        "line 31, column 'clicked': a binary task takes 0 and 1, or -1 and 1, got 5 after 0, 1",
    ),
    "one class": (
        text(HEADER, *(f"1{row[1:]}" for row in ROWS)),
        "column 'clicked': every training label is 1: there is nothing to learn from one class",
    ),
    "random bytes": (random.Random(1).randbytes(5000), "is not text in UTF-8: there is a zero byte near its start"),
    "an empty file": (b"", "is empty"),
    "a header alone": (text(HEADER), "has a header and no rows"),
}


def refusal(train: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What `fit` says at last, having written nothing."""
    folder = train.parent / "out"
    places = ["--artifacts", str(folder / "artifacts"), "--checkpoints", str(folder / "checkpoints"), "--device", "cpu"]
    fit = ["fit", "--train", str(train), "--label", "clicked", "--task", "binary", "--model", "lr", *places, *flags]
    assert main(fit) == 1
    assert not list(folder.glob("artifacts/*"))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert f"{train.name}'" in said
    return said


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_text_file_is_a_sentence(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, sentence = BROKEN[fault]
    (tmp_path / "log.csv").write_bytes(content)
    assert sentence in refusal(tmp_path / "log.csv", capsys)


def test_a_field_missing_from_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.csv").write_bytes(text(HEADER, *ROWS))
    (tmp_path / "held-out.csv").write_bytes(text("clicked,user", "1,u1"))
    with pytest.raises(AssertionError, match=r"held-out\.csv' has no column 'app'"):
        refusal(tmp_path / "log.csv", capsys, "--validation", str(tmp_path / "held-out.csv"))


def write(path: Path, **columns: object) -> None:
    pq.write_table(pa.table(columns), path, write_page_checksum=True, compression="zstd")


def log_columns() -> dict[str, object]:
    cells = [row.split(",") for row in ROWS]
    return {
        "clicked": [int(row[0]) for row in cells],
        "user": [row[1] for row in cells],
        "app": [row[2] for row in cells],
    }


def test_flipped_bits_are_a_sentence_or_change_nothing(tmp_path: Path) -> None:
    """The pages of this file have checksums; a few bits of their headers mean nothing. The footer's are names, too."""
    path = tmp_path / "log.parquet"
    write(path, **log_columns())
    whole, rows, draw = path.read_bytes(), rows_of(path), random.Random(1)
    footer, sentences = len(whole) - 8 - pq.read_metadata(path).serialized_size, list[str]()
    for _ in range(200):
        at = draw.randrange(footer)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        try:
            found = rows_of(path)
        except DataError as error:
            sentences.append(str(error))
        else:
            assert found == rows, f"byte {at}"
    assert len(sentences) > 100
    assert [each for each in sentences if "log.parquet'" not in each or "\n" in each] == []


def rows_of(path: Path) -> list[dict[str, object]]:
    return [row for batch in open_source(path, label="clicked").batches() for row in batch.to_pylist()]


def dense(path: Path, **columns: object) -> None:
    """As few bytes as these columns can have: one page each."""
    pq.write_table(
        pa.table(columns),
        path,
        compression="zstd",
        row_group_size=BOMB_ROWS,
        data_page_size=2**30,
        max_rows_per_page=BOMB_ROWS,
        write_statistics=False,
        store_schema=False,
    )


def test_rows_out_of_nothing_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * BOMB_ROWS, pa.int32()), ["A" * 870])
    dense(tmp_path / "bomb.parquet", clicked=pa.array([1] * BOMB_ROWS, pa.int8()), user=repeated)
    size = (tmp_path / "bomb.parquet").stat().st_size
    assert size < 1000
    said = refusal(tmp_path / "bomb.parquet", capsys)
    assert f"has 1,000,000 rows in {size} bytes: that is no log" in said


def test_a_value_of_a_million_bytes_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = log_columns()
    users = columns["user"]
    assert isinstance(users, list)
    users[40] = "A" * 1_000_000
    write(tmp_path / "log.parquet", **columns)
    said = refusal(tmp_path / "log.parquet", capsys)
    assert "row 41, column 'user': expected text of at most 65,536 bytes, got 1,000,000" in said


READ = """
import resource, sys
from pathlib import Path
from training.sources import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for batch in open_source(Path(sys.argv[1])).batches():
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_value_that_is_repeated_is_not_unfolded(tmp_path: Path) -> None:
    """A gigabyte of text in a few kilobytes, labels and all, is read in a few megabytes."""
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * BOMB_ROWS, pa.int32()), ["A" * 870])
    dense(tmp_path / "bomb.parquet", clicked=pa.array([n % 2 for n in range(BOMB_ROWS)], pa.int8()), user=repeated)
    read = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "bomb.parquet"], capture_output=True, text=True, check=True
    )
    assert int(read.stdout) < 100 * 1024, "KiB"
