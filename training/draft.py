"""What `infer` proposes, written down: a table for the terminal, and a commented recipe to start from."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from itertools import chain
from pathlib import Path
from textwrap import wrap

from bundle.manifest import NAME_PATTERN, RESERVED_NAMES
from bundle.schema import Kind, Multi, Numeric
from models import MODELS
from training.infer import Inferred, Proposal
from training.recipe import METRICS


def describe(inferred: Inferred) -> str:
    """What was detected, and a table of the columns, for the terminal."""
    header = ("column", "type", "distinct", "missing", "kind", "why")
    rows = [header, *(_cells(proposal) for proposal in inferred.proposals)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*_summary(inferred), "", *table])


def render_recipe(inferred: Inferred, *, folder: Path | None = None) -> str:
    """A complete, commented recipe (TOML).

    Paths in a recipe are relative to it: `folder` is where it will lie; None writes absolute paths.
    """
    source = inferred.source
    data = [f"train = {_quoted(_path_from(folder, source.path))}", f"label = {_quoted(inferred.label)}"]
    if source.field_map:
        data.append(f"field_map = {_quoted(_path_from(folder, source.field_map))}")
    return "\n".join(
        [
            *(f"# {line}" for line in _summary(inferred)),
            "",
            f"name = {_quoted(_recipe_name(source.path))}",
            f"task = {_quoted(inferred.task)}  # {' | '.join(METRICS)}",
            "",
            "[data]",
            *data,
            *_ranking_lines(inferred),
            '# validation = "…"  # another file; without one:',
            'split = { by = "fraction", fraction = 0.1 }  # fraction | column | group | time',
            "",
            "[fields]",
            *chain.from_iterable(_field_lines(proposal) for proposal in inferred.proposals),
            "[model]",
            *wrap(", ".join(MODELS), 110, initial_indent="# key: ", subsequent_indent="#   "),
            'key = "fm"',
            f"embedding_dim = 16  # leave it out for {' and '.join(_without('embedding_dim'))}",
            "",
            "[fit]",
            'optimizer = "adagrad"  # adagrad | adam',
            "learning_rate = 0.05",
            "batch_size = 512",
            "epochs = 30",
            "patience = 4  # stop after so many epochs without a better validation metric",
            "seed = 2017",
            "",
        ]
    )


def _without(option: str) -> Iterator[str]:
    """The models that have no such option."""
    return (key for key, model in MODELS.items() if option not in {field.name for field in fields(model.Config)})


def _summary(inferred: Inferred) -> list[str]:
    looked = f"all {inferred.row_count:,} rows" if inferred.whole else f"the first {inferred.row_count:,} rows"
    lines = [
        f"{inferred.source.path.name}: {inferred.source.detected}; looked at {looked}",
        f"label {_quoted(inferred.label)}: {inferred.task}",
    ]
    return [*lines, *(f"note: {note}" for note in inferred.notes)]


def _cells(proposal: Proposal) -> tuple[str, ...]:
    kind = proposal.kind.kind if proposal.kind else "left out"
    name = proposal.name if proposal.name.isprintable() else repr(proposal.name)
    return name, proposal.type, f"{proposal.distinct:,}", f"{proposal.missing:,}", kind, proposal.why


def _ranking_lines(inferred: Inferred) -> Iterator[str]:
    """What a ranking and fresh negatives need, to be uncommented."""
    fields = inferred.fields
    users = [name for name, kind in fields.items() if kind.source == "user" and kind.kind == "categorical"]
    items = [name for name, kind in fields.items() if kind.source == "item"]
    yield f'# user = {_quoted([*users, "…"][0])}  # task = "ranking" and fit.fresh_negatives want who, and what:'
    yield f"# item = {_quoted(items or ['…'])}"


def _field_lines(proposal: Proposal) -> Iterator[str]:
    missing = f", {proposal.missing:,} missing" if proposal.missing else ""
    yield f"# {proposal.type}, {proposal.distinct:,} distinct{missing}: {proposal.why}"
    if proposal.kind is None:
        yield f"# {_quoted(proposal.name)} is left out"
    else:
        yield f"{_key(proposal.name)} = {_inline(proposal.kind)}"
    yield ""


def _inline(kind: Kind) -> str:
    """The kind as an inline table: its name, its source, and what is not the default."""
    options = {"kind": kind.kind, "source": kind.source, **kind.model_dump(exclude_defaults=True)}
    if isinstance(kind, Multi):
        options |= {"max_len": kind.max_len, "separator": kind.separator}
    if isinstance(kind, Numeric):
        options |= {"transform": kind.transform}
    return "{ " + ", ".join(f"{option} = {_quoted(value)}" for option, value in options.items()) + " }"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(value: str | int | bool | list[str]) -> str:
    """A TOML string, integer, boolean or list: as in JSON, but for one control character that TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _path_from(folder: Path | None, path: Path) -> str:
    return Path(os.path.relpath(path, folder) if folder else path.resolve()).as_posix()


def _recipe_name(path: Path) -> str:
    name = re.sub(r"[^a-z0-9_-]+", "-", path.name.split(".")[0].lower()).strip("-_")[:64]
    return name if re.fullmatch(NAME_PATTERN, name) and name not in RESERVED_NAMES else "my-model"
