"""docs/models.md tells of every model and of every option, with its real default."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from models import MODELS, Layout

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
REFERS = {"nfm": "see there", "fwnfm": "as nfm", "ensemble": "as its members"}  # exact with some options
LAYOUT = Layout(num_features=4, widths=(1, 1, 1), needs_values=False)

Row = tuple[str, ...]


def table_rows() -> list[Row]:
    return [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in PAGE.splitlines() if line[:1] == "|"]


def spelt(default: object) -> str:
    """A default as in TOML; a dash where there is none."""
    return "–" if default is None else f"`{json.dumps(default, default=asdict)}`"


def test_every_option_is_there_with_its_default_and_no_other() -> None:
    expected = {
        (key, f"`{option.name}`", spelt(option.default))
        for key, model in MODELS.items()
        for option in fields(model.Config)
    }
    documented = [
        (key, option, default)
        for keys, option, default, *_ in (row for row in table_rows() if len(row) == 4)
        for key in re.findall(r"`(\w+)`", keys)
    ]
    assert len(expected) > 50
    assert len(documented) == len(set(documented))
    assert set(documented) == expected


def test_every_model_has_a_section_that_opens_with_its_equation() -> None:
    sections = re.findall(r"^## `(\w+)`\n\n    \S", PAGE, re.MULTILINE)
    assert sorted(sections) == sorted(MODELS)


@pytest.mark.parametrize("key", MODELS)
def test_the_overview_says_what_the_model_says(key: str) -> None:
    model = MODELS[key](LAYOUT, MODELS[key].Config())
    (row,) = (row for row in table_rows() if row[0] == f"[`{key}`](#{key})")
    exact, sizes = row[2], re.findall(r"`(\w+)`", row[4])
    assert exact == REFERS.get(key, "yes" if model.exact else "no")
    assert sizes == list(model.sizes)
    assert all(f"per {axis}" in row[4] for axis in model.sizes.values())


@pytest.mark.parametrize("key", [key for key, model in MODELS.items() if hasattr(model.Config, "embedding_dim")])
def test_every_section_says_where_dropout_sits_and_what_is_explained(key: str) -> None:
    section = PAGE.split(f"## `{key}`\n")[1].split("\n## ")[0]
    assert re.search(r"`dropout` is\s+on ", section)
    assert re.search(r"\*Explains\*\s", section)
    assert re.search(r"\*Use it\*\s", section)
