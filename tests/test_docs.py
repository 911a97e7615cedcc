"""Whatever a person can set, call, read or run is documented, and what the documents show is real."""

import argparse
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from msgspec import Struct
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bundle import EncodedRows
from bundle.schema import Categorical, Hash, Multi, Numeric
from bundle.session import Session
from bundle.values import LARGEST
from models import MODELS, Layout, Model
from service import admin_messages, keygen, messages, metrics, oip_messages, settings
from service.app import create_app
from service.bench import cli as bench
from service.errors import KINDS, Problem, Refusal
from service.routes import ACTIONS
from service.settings import PREFIX, Settings
from training import recipe
from training.graphs import write_graphs
from training.parsers import command_line

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
MAKEFILE = (ROOT / "Makefile").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()


def parse_service(words: list[str]) -> object:
    nested = {"bench": bench.parser, "keygen": keygen.parser}
    return nested[words[0]]().parse_args(words[1:]) if words and words[0] in nested else settings.load(words)


PROGRAMS: dict[str, Callable[[list[str]], object]] = {"training": command_line().parse_args, "service": parse_service}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

Row = tuple[str, ...]
MESSAGES = {messages.__name__, admin_messages.__name__}


def doc(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def rows(text: str) -> list[Row]:
    """The rows of all tables of a page, as cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def undocumented(expected: Sequence[Row], text: str) -> list[Row]:
    """The rows, given by their first cells, that no table of the page has."""
    found = rows(text)
    return [row for row in expected if not any(cells[: len(row)] == row for cells in found)]


def code(value: object) -> str:
    """A value in a table, spelt as in TOML; a dash where there is none."""
    if value is None:
        return "–"
    spelt = value if isinstance(value, Path) else json.dumps(list(value) if isinstance(value, tuple) else value)
    return f"`{spelt}`".replace("|", r"\|")


def test_a_gap_is_seen() -> None:
    table = '| setting | default |\n|---|---|\n| `port` | `8000` |\n| `split` | `"\\|"` |\n'
    assert undocumented([("`port`", "`8000`"), ("`split`", code("|"))], table) == []
    assert undocumented([("`port`", "`80`"), ("`host`",)], table) == [("`port`", "`80`"), ("`host`",)]


def test_every_setting_is_documented() -> None:
    expected = [
        (
            f"`{name}`",
            f"`--{name.replace('_', '-')}`",
            f"`{PREFIX}{name.upper()}`",
            code(field.default).replace('"', ""),
        )
        for name, field in Settings.model_fields.items()
    ]
    assert undocumented(expected, doc("configuration.md")) == []


def test_every_variable_of_compose_is_documented() -> None:
    defaults = re.findall(r"\$\{([A-Z_]+):-([^}]+)\}", COMPOSE)
    assert len(defaults) > 4
    assert undocumented([(f"`{name}`", f"`{value}`") for name, value in defaults], doc("configuration.md")) == []


def test_every_metric_is_documented() -> None:
    assert undocumented([(f"`{name}`",) for name in metrics.names()], doc("http-api.md")) == []


def test_every_endpoint_is_documented() -> None:
    paths = create_app(Settings(admin=True)).openapi()["paths"]
    expected = [(f"`{method.upper()} {path}`",) for path, methods in paths.items() for method in methods]
    assert len(expected) > 10
    assert undocumented(expected, doc("http-api.md")) == []


def test_every_key_of_a_message_is_documented() -> None:
    written = " ".join(re.findall(r"`([^`\n]+)`", "\n".join(map("|".join, rows(doc("http-api.md"))))))
    shapes = [Problem, Refusal]
    shapes += [each for module in (messages, admin_messages) for each in vars(module).values() if is_message(each)]
    keys = {name for shape in shapes for name in shape.model_fields}
    prose = written + " ".join(blocks(doc("http-api.md"), "json"))
    assert len(keys) > 50
    assert sorted(key for key in keys if not re.search(rf"\b{key}\b", prose)) == []


def test_every_key_of_a_tensor_message_is_documented() -> None:
    messages = [each for each in vars(oip_messages).values() if isinstance(each, type) and issubclass(each, Struct)]
    keys = {name for message in messages for name in message.__struct_fields__}
    assert len(keys) > 30
    text = doc("http-api.md")
    section = text[text.index("## Open Inference Protocol") : text.index("## Health")]
    assert sorted(key for key in keys if not re.search(rf"\b{key}\b", section)) == []


def is_message(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, BaseModel) and thing.__module__ in MESSAGES


def test_every_kind_of_problem_is_documented() -> None:
    slugs = [re.sub(r"(?<!^)(?=[A-Z])", "-", error.__name__).lower() for error in KINDS]
    expected = [(f"`{slug}`", str(kind.status.value)) for slug, kind in zip(slugs, KINDS.values(), strict=True)]
    assert undocumented(expected, doc("http-api.md")) == []


def test_every_command_is_documented_with_its_flags() -> None:
    documented = {cells[0]: cells[2] for cells in rows(doc("configuration.md")) if cells[0].startswith("`python -m")}
    commands = {f"`python -m training {name}`": parser for name, parser in subcommands(command_line())}
    commands |= {"`python -m service bench`": bench.parser(), "`python -m service keygen`": keygen.parser()}
    assert set(documented) == {*commands, "`python -m service`"}
    for name, parser in commands.items():
        flags = {action.option_strings[-1] for action in parser._actions if action.option_strings} - {"--help"}
        assert set(re.findall(r"--[a-z-]+", documented[name])) == flags


def subcommands(parser: argparse.ArgumentParser, above: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that can be run, with its parser."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield above.strip(), parser
    for action in nested:
        for name, below in action.choices.items():
            yield from subcommands(below, f"{above} {name}")


def test_every_recipe_key_is_documented() -> None:
    tables: dict[str, type[BaseModel]] = {
        "": recipe.Recipe,
        "data.": recipe.Data,
        "data.split.": recipe.Split,
        "fit.": recipe.Fit,
        "export.": recipe.Export,
    }
    expected = [
        (f"`{table}{name}`", default(field))
        for table, shape in tables.items()
        for name, field in shape.model_fields.items()
        if not isinstance(field.default, BaseModel) and name != "data"
    ]
    assert len(expected) > 20
    assert undocumented(expected, doc("configuration.md")) == []


def test_every_key_of_a_field_is_documented() -> None:
    shapes: dict[str, type[BaseModel]] = {"categorical": Categorical, "multi": Multi, "numeric": Numeric, "hash": Hash}
    expected = [
        (kind, f"`{name}`", "required" if name == "kind" else default(field))
        for kind, shape in shapes.items()
        for name, field in shape.model_fields.items()
    ]
    assert set(expected) == by_kind(doc("configuration.md"), set(shapes))


def default(field: FieldInfo) -> str:
    return "required" if field.is_required() else code(field.default)


def by_kind(text: str, kinds: set[str]) -> set[Row]:
    """(kind, key, default) of the tables whose first cell lists kinds."""
    listed = [(re.findall(r"`(\w+)`", cells[0]), cells) for cells in rows(text) if len(cells) == 4]
    return {(kind, cells[1], cells[2]) for names, cells in listed if set(names) <= kinds for kind in names}


def test_the_range_of_scaled_numbers_is_documented() -> None:
    assert f"clipped to ±{LARGEST:,.0f}:" in doc("data.md")


def test_the_recipe_in_the_docs_is_one() -> None:
    of_service, *of_training = blocks(doc("configuration.md"), "toml")
    written, in_two_steps, ranking = (recipe.check(tomllib.loads(text), origin="of the docs") for text in of_training)
    assert (written.key, written.fit.l2) == ("afm", {"embedding": 1e-3, "weight": 1e-4})
    assert in_two_steps.first_step
    assert (in_two_steps.first_step.key, in_two_steps.fit.freeze) == ("fm", ("bias", "weight", "embedding"))
    assert (ranking.task, ranking.data.item, ranking.monitor) == ("ranking", ("page", "price"), "ndcg@10")
    assert tomllib.loads(of_service).keys() < Settings.model_fields.keys()


def test_requests_and_answers_in_the_docs_have_the_real_shape() -> None:
    shown = re.findall(r":(\w+) -d '(.*?)'\n```\n```json\n(.*?)```", doc("http-api.md"), re.DOTALL)
    assert {verb for verb, _, _ in shown} == set(ACTIONS)
    for verb, request, answer in shown:
        action = ACTIONS[verb]
        action.request.model_validate_json(request)
        (Problem if '"errors"' in answer else action.answer).model_validate_json(answer)


def test_the_explanation_in_the_docs_adds_up() -> None:
    answers = map(json.loads, blocks(doc("http-api.md"), "json"))
    (explanation,) = next(answer["explanations"] for answer in answers if "explanations" in answer)
    terms = [*explanation["fields"], *explanation["pairs"], explanation["remaining"]]
    total = explanation["bias"] + explanation["residual"] + sum(term["contribution"] for term in terms)
    assert total == pytest.approx(explanation["logit"], abs=2 * explanation["completeness_error"])
    (genres,) = (term for term in explanation["fields"] if "values" in term)
    assert sum(value["contribution"] for value in genres["values"]) == pytest.approx(genres["contribution"], abs=1e-7)


def test_every_make_target_is_in_the_readme() -> None:
    missing = [target for target in make_targets() if not re.search(rf"\bmake {target}\b", README.read_text())]
    assert missing == []


def make_targets() -> list[str]:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    return phony[1].split()


@every_page
def test_commands_of_the_page_exist(page: Path) -> None:
    found = list(commands(page.read_text()))
    assert found or page != README
    for words in found:
        assert accepted(words), " ".join(words)


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of our own programs, word by word, in the shell blocks of a page."""
    for block in blocks(text, "sh"):
        unquoted = re.sub(r"'[^']*'", "''", block)  # the body of a request is no command
        for command in re.split(r"&&|\|\||[|;&>\n]", unquoted.replace("\\\n", " ")):
            words = list(dropwhile(is_assignment, shlex.split(command, comments=True)))
            if words[:1] == ["make"] or words[1:2] == ["-m"]:
                yield words


def is_assignment(word: str) -> bool:
    return re.match(r"[A-Z_]+=", word) is not None


def accepted(words: list[str]) -> bool:
    """Whether the real parser, or the Makefile, takes this command."""
    if words[0] == "make":
        targets = [word for word in words[1:] if not is_assignment(word)]
        variables = [f"$({word.partition('=')[0]})" for word in words[1:] if is_assignment(word)]
        return set(targets) <= set(make_targets()) and all(variable in MAKEFILE for variable in variables)
    if words[2] not in PROGRAMS:
        return importlib.util.find_spec(words[2]) is not None
    try:
        PROGRAMS[words[2]](words[3:])
    except (SystemExit, settings.SettingsRefused):
        return False
    return True


def test_a_command_that_does_not_exist_is_seen() -> None:
    block = "```sh\nmake demo PORT=1 && .venv/bin/python -m training fit r.toml \\\n  --set fit.epochs=2\ncurl x\n```\n"
    first, second = commands(block)
    assert (first, accepted(first)) == (["make", "demo", "PORT=1"], True)
    assert (second[-1], accepted(second)) == ("fit.epochs=2", True)
    for wrong in ("make dmeo", "make demo PROT=1", "python -m training fit --epochs 2", "python -m trainig"):
        assert not accepted(wrong.split())


@every_page
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", page.read_text())
    local = [target for target in map("".join, targets) if not re.match(r"[a-z]+:", target)]
    broken = [target for target in local if not leads_somewhere(page, target)]
    assert broken == []


def leads_somewhere(page: Path, target: str) -> bool:
    """Whether the file exists, and in it a heading for the fragment."""
    path, _, fragment = target.partition("#")
    file = page.parent / path if path else page
    return file.exists() and (not fragment or fragment in anchors(file.read_text()))


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_python_of_the_page_compiles(page: Path) -> None:
    for block in blocks(page.read_text(), "python"):
        compile(block, page.name, "exec")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fwfm(tmp_path: Path) -> type[Model]:
    """The model of docs/adding-a-model.md, built from the page."""
    path = tmp_path / "fwfm.py"
    path.write_text(blocks(doc("adding-a-model.md"), "python")[0])
    model: type[Model] = load(path).FwFM
    return model


def test_the_model_of_the_docs_passes_the_formula_test_of_the_docs(
    fwfm: type[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "fwfm", fwfm)
    formulas = load(ROOT / "tests" / "models" / "test_formulas.py")
    exec(blocks(doc("adding-a-model.md"), "python")[2], vars(formulas))
    formulas.test_the_model_is_its_paper("fwfm", {"embedding_dim": formulas.K}, formulas.fwfm)


@torch.no_grad()
def test_the_model_of_the_docs_comes_apart_and_exports(fwfm: type[Model], tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = fwfm(Layout(num_features=20, widths=(1, 2, 1), needs_values=True), fwfm.Config(embedding_dim=4)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ids, values = torch.randint(1, 20, (9, 4)), torch.randn(9, 4)
    logits = model(ids, values)
    bias, field, pair, residual = model.explain(ids, values).terms
    torch.testing.assert_close(bias + field.sum(1) + pair.sum(1) + residual, logits)
    graphs = write_graphs(model, tmp_path)
    encoded = EncodedRows(ids.numpy(), values.numpy())
    scored = Session(tmp_path, graphs["score"]).run(encoded)["logit"]
    explained = Session(tmp_path, graphs["explain"]).run(encoded)["pair"]
    torch.testing.assert_close(torch.from_numpy(scored), logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(explained), pair, rtol=0, atol=1e-5)
