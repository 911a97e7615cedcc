"""Recipes and bundles side by side: what is not trained yet is trained, what is finished is kept."""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

import bundle
from bundle import BundleError, store
from bundle.schema import Strict
from training import results
from training.dataset import digest
from training.errors import DataError, RecipeError, TrainingError
from training.evaluate import evaluate
from training.export import export
from training.pipeline import Options, forget, train
from training.progress import say
from training.recipe import START, Metric, Recipe, load
from training.refusals import refusal
from training.results import Metrics, Result
from training.start import open_source, origin_of


class Row(Strict):
    """One row of a table file: a recipe, trained once a seed, and what was published for its model."""

    recipe: Path
    name: str | None = None
    seeds: tuple[int, ...] = Field(default=(), description="default: the recipe's own")
    without: tuple[str, ...] = Field(default=(), description="fields of the recipe to leave out: what they are worth")
    published: dict[Metric, float] = Field(default={})
    source: str = Field(default="", description="where the published numbers stand")


class Table(Strict):
    """A file of rows, such as recipes/frappe/papers.toml; paths are relative to it."""

    row: tuple[Row, ...] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the comparison: recipes that differ by their seed alone, or one bundle."""

    name: str
    recipes: tuple[Recipe, ...] = ()
    bundle: Path | None = None
    published: dict[Metric, float]
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What is finished of an entry; `tests` are the metrics of each result on a file of its own, if there is one."""

    entry: Entry
    results: tuple[Result, ...]
    tests: tuple[Metrics, ...] = ()

    @property
    def wanted(self) -> int:
        return len(self.entry.recipes) or 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """`folder` is where results are kept; `train` is False where only what is finished is wanted."""

    options: Options
    folder: Path
    train: bool = True


def entries(paths: Sequence[Path], *, only: Sequence[str] = ()) -> list[Entry]:
    """The rows that table files, recipes and bundle folders ask for; `only` names those to keep.

    A folder of versions stands for its highest. Raises RecipeError for a file that is neither, and for two rows of
    one name.
    """
    found = [entry for path in paths for entry in _entries_of(path)]
    names = [entry.name for entry in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"two rows are called {twice[0]!r}: give them names that differ")
    for name in only:
        if name not in names:
            raise RecipeError(f"--only {name!r:.80}: there is no such row (there are {', '.join(names)})")
    return [entry for entry in found if not only or entry.name in only]


def compare(wanted: Sequence[Entry], place: Place) -> Iterator[list[Compared]]:
    """What is finished so far, again after every run; what is finished already is not trained again.

    First seeds come before second ones, so that the whole table is there early. A run that is refused leaves its
    place empty, and after the last one a TrainingError says so.
    """
    found: dict[str, dict[int, Result]] = {entry.name: {} for entry in wanted}
    for entry in wanted:
        if entry.bundle:
            found[entry.name][0] = results.of_bundle(entry.bundle)
    runs = [
        (entry, position)
        for position in range(max(len(entry.recipes) for entry in wanted))
        for entry in wanted
        if position < len(entry.recipes)
    ]
    failed = []
    for number, (entry, position) in enumerate(runs, start=1):
        recipe = entry.recipes[position]
        try:
            result = _finished(entry.name, recipe, place, f"run {number} of {len(runs)}")
        except (TrainingError, BundleError, OSError) as error:
            failed.append(f"{entry.name}, seed {recipe.fit.seed}: {error}")
            say(f"error: {failed[-1]}")
            continue
        if result:
            found[entry.name][position] = result
        yield _compared(wanted, found)
    if not runs:
        yield _compared(wanted, found)
    if failed:
        raise TrainingError(f"{len(failed)} of {len(runs)} runs failed, the first was {failed[0]}")


def measured(compared: Sequence[Compared], data: Path) -> list[Compared]:
    """The same with the metrics of every bundle on this file."""
    return [
        replace(each, tests=tuple(_measure(each.entry, result, data) for result in each.results)) for each in compared
    ]


def _measure(entry: Entry, result: Result, data: Path) -> Metrics:
    model, of_recipe = bundle.open(result.bundle), entry.recipes[0].data if entry.recipes else None
    ranking = model.manifest.task == "ranking"
    if ranking and of_recipe is None:
        raise DataError(
            f"{entry.name}: a ranking is measured with its training file, so give its recipe, not its bundle"
        )
    field_map, train = (of_recipe.field_map, of_recipe.train) if of_recipe else (None, None)
    return {**evaluate(model, data, field_map=field_map, train=train if ranking else None)}


def _compared(wanted: Sequence[Entry], found: dict[str, dict[int, Result]]) -> list[Compared]:
    return [
        Compared(entry=entry, results=tuple(found[entry.name][at] for at in sorted(found[entry.name])))
        for entry in wanted
    ]


def _finished(name: str, recipe: Recipe, place: Place, number: str) -> Result | None:
    """The saved result of this recipe on these data; where there is none, train, or go on with what was begun."""
    key = _key(recipe)
    path = place.folder / f"{recipe.name}-seed{recipe.fit.seed}-{key}.json"
    result = results.load(path)
    if result or not place.train:
        return result
    say(f"{number}: {name}, seed {recipe.fit.seed}")
    folder = f".compare-{key}"  # no recipe can have this name
    resume = (place.options.checkpoints / folder).exists() and not place.options.restart
    options = replace(place.options, folder=folder, resume=resume)
    result = results.of_bundle(export(train(recipe, options), options.artifacts))
    results.save(result, path)
    forget(recipe, options)  # not before the result is safe
    return result


def _key(recipe: Recipe) -> str:
    """The same for all that gives the same numbers: what the recipe says, the data it names, what it starts from."""
    said = recipe.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"data": {"train", "validation", "field_map"}, "model": set(START), "tune": True},
    )
    source = open_source(recipe)
    files = (recipe.data.train, recipe.data.validation, recipe.data.field_map)
    whole = [said, list(recipe.fields or ()), _digest(*filter(None, files)), origin_of(recipe, source)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _digest(*files: Path) -> str:
    return digest(*files)


def _entries_of(path: Path) -> Iterator[Entry]:
    if path.is_dir():
        yield _bundle(path)
        return
    document = _document(path)
    if document is None or "row" not in document:
        recipe = load(path)
        yield Entry(name=recipe.name, recipes=(recipe,), published={})
        return
    for row in _table(document, path).row:
        recipe = load(path.parent / row.recipe)
        seeds = row.seeds or (recipe.fit.seed,)
        if len(set(seeds)) < len(seeds):
            raise RecipeError(f"table {str(path)!r}: {row.recipe} has the same seed twice")
        yield Entry(
            name=row.name or recipe.name + (f" without {', '.join(row.without)}" if row.without else ""),
            recipes=tuple(_without(row, load(path.parent / row.recipe, [f"fit.seed={n}"]), path) for n in seeds),
            published=row.published,
            source=row.source,
        )


def _without(row: Row, recipe: Recipe, path: Path) -> Recipe:
    fields = recipe.fields or {}
    kept = {name: kind for name, kind in fields.items() if name not in row.without}
    if row.without and not 0 < len(kept) == len(fields) - len(row.without):
        known = ", ".join(fields) or "it names none, so it takes every column"
        raise RecipeError(
            f"table {str(path)!r}: without: expected some fields of {row.recipe}, each once, and not all ({known}), "
            f"got {', '.join(row.without)!r:.80}"
        )
    if not row.without:
        return recipe
    item = tuple(name for name in recipe.data.item if name not in row.without)
    if recipe.data.user in row.without or (recipe.data.item and not item):
        raise RecipeError(
            f"table {str(path)!r}: without: {row.recipe} says who and what by {recipe.data.user} and "
            f"{', '.join(recipe.data.item)}, and needs both, got {', '.join(row.without)!r:.80}"
        )
    return recipe.model_copy(update={"fields": kept, "data": recipe.data.model_copy(update={"item": item})})


def _bundle(path: Path) -> Entry:
    versions = store.versions(path.parent, path.name)
    bundle = path / str(versions[-1]) if versions else path
    manifest = store.open_verified(bundle).manifest
    return Entry(name=f"{manifest.name} version {manifest.version}", bundle=bundle, published={})


def _document(path: Path) -> dict[str, Any] | None:
    """None where `load` has something to say about the file."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return None


def _table(document: dict[str, Any], path: Path) -> Table:
    try:
        return Table.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"table {str(path)!r}: {refusal(error, Table)}") from None
