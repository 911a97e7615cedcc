"""Rules of the house that no linter knows: nothing is unpickled, one file imports onnxruntime, no real data."""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("bundle", "models", "training", "service", "client", "benchmarks")
UNPICKLERS = {"pickle", "_pickle", "cPickle", "joblib", "marshal", "shelve", "dill", "cloudpickle"}

DATA = ROOT.parent / "shared" / "data"
RUN = 4  # so many neighbouring values, one of them of a telltale column, mark a row of the data
TELLTALE = {"user", "item", "zip", "movie", "timestamp"}
TABLES = {".parquet", ".arrow", ".feather", ".npz", ".npy", ".gz", ".zst", ".zip", ".pkl", ".pt"}


def modules() -> list[Path]:
    return sorted(file for program in PROGRAMS for file in (ROOT / program).rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """The top-level packages that a module names in its imports."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (name.name.split(".")[0] for name in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.split(".")[0]


def unpickling(source: str) -> Iterator[str]:
    """What in a module could run code that lies in a file."""
    yield from UNPICKLERS.intersection(imported(source))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module="torch", names=names):
                yield from (f"torch.{name.name}" for name in names if name.name == "load")
            case ast.Constant(value=str(name)) if name in UNPICKLERS:  # import_module("pickle")
                yield name
            case ast.Call(func=ast.Attribute(value=ast.Name("torch"), attr="load"), keywords=given):
                if not any(each.arg == "weights_only" and is_constant(each.value, True) for each in given):
                    yield "torch.load"
            case ast.keyword(arg="allow_pickle", value=value) if not is_constant(value, False):
                yield "allow_pickle"
            case ast.Attribute(attr="read_pickle" | "to_pickle" as name):
                yield name
            case ast.Name("eval" | "exec" | "compile" as name):
                yield name
            case ast.Attribute(value=ast.Name("yaml"), attr="load" | "load_all" | "unsafe_load" | "full_load" as name):
                yield f"yaml.{name}"
            case ast.ImportFrom(module="yaml", names=names):
                yield from (f"yaml.{name.name}" for name in names if "load" in name.name and "safe" not in name.name)


def is_constant(node: ast.expr, expected: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is expected


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, joblib.numpy_pickle as p",
        "def f():\n    from dill import loads",
        "importlib.import_module('shelve')",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "pandas.read_pickle(path)",
        "yaml.load(text, yaml.FullLoader)",
        "from yaml import unsafe_load, load",
        "eval(text)",
        "list(map(exec, texts))",
        "builtins = __builtins__; compile(text, '', 'exec')",
    ],
)
def test_unpickling_is_seen(source: str) -> None:
    assert list(unpickling(source))


def test_nothing_is_unpickled() -> None:
    harmless = """import json\nnp.load(path, allow_pickle=False)\ntorch.load(path, weights_only=True)
yaml.safe_load(text)\nmodel.eval()\nre.compile(text)\n'no pickle here'"""
    assert list(unpickling(harmless)) == []
    found = {str(file.relative_to(ROOT)): list(unpickling(file.read_text())) for file in modules()}
    assert len(found) > 30
    assert {file: names for file, names in found.items() if names} == {}


def test_one_file_imports_onnxruntime() -> None:
    importing = [file for file in modules() if "onnxruntime" in imported(file.read_text())]
    assert [str(file.relative_to(ROOT)) for file in importing] == ["bundle/session.py"]


class Rows:
    """Runs of RUN neighbouring values of the real data sets, each with a telltale column."""

    def __init__(self) -> None:
        self._known: list[pa.Array] = []
        self._columns: set[str] = set()
        for file in sorted(DATA.glob("*/*.parquet")):
            table = pq.read_table(file)
            plain = [field.name for field in table.schema if not pa.types.is_list(field.type) and field.name != "label"]
            self._columns |= set(table.schema.names)
            for start in range(len(plain) - RUN + 1):
                names = plain[start : start + RUN]
                if TELLTALE & set(names):
                    values = [table[name].cast(pa.string()) for name in names]
                    self._known.append(pc.unique(pc.binary_join_element_wise(*values, " ")))

    def runs(self, text: str) -> set[str]:
        """Runs of words in a text, without column names: the same for CSV, JSON, TOML and one value a line."""
        words = [word for word in re.split(r"[\s\"'`,;:|=()\[\]{}<>]+", text) if word not in self._columns]
        return {" ".join(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}

    def among(self, runs: set[str]) -> set[str]:
        array = pa.array(runs, pa.string())
        return {run for known in self._known for run in array.filter(pc.is_in(array, known)).to_pylist()}


@pytest.fixture(scope="module")
def rows() -> Rows:
    if not list(DATA.glob("*/*.parquet")):
        pytest.skip("the real data sets are not on this machine")
    return Rows()


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    """The files of the repository, with those that are about to be."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_a_row_of_the_data_is_seen_in_any_notation(rows: Rows) -> None:
    row = next(pq.ParquetFile(sorted(DATA.glob("*/*.parquet"))[0]).iter_batches(1)).to_pylist()[0]
    for text in (json.dumps(row), json.dumps(row, indent=1), "\t".join(map(str, row.values())), repr(row)):
        assert rows.among(rows.runs(f"before {text} after"))
    assert not rows.among(rows.runs("user u1 item a1 morning friday free sunny"))


def test_no_row_of_the_data_is_committed(rows: Rows, committed: list[Path]) -> None:
    assert [file.name for file in committed if file.suffix in TABLES] == []
    runs = {file.name: rows.runs(file.read_text(errors="replace")) for file in committed}
    real = rows.among(set().union(*runs.values()))
    assert [name for name in runs if runs[name] & real] == []
