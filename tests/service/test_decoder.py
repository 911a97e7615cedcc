"""msgspec and the models behind the OpenAPI document take the same bodies, and read the same in them."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import Categorical, Encoder, FeatureSchema, InputError, Multi, Numeric
from bundle.schema import FittedField, Hash
from bundle.vocabulary import Vocabulary
from service.decoder import Decoder, RankAsked
from service.errors import BodyRefused, BodyUnreadable
from service.messages import CandidatesRequest
from service.routes import ACTIONS
from service.tables import Rows, Table

VALUES = {"user": ["u1", "1", "true"], "tags": ["fun", "new", "1"]}
KINDS = {
    "user": Categorical(),
    "city": Categorical(hash=Hash(buckets=8)),
    "tags": Multi(max_len=3),
    "age": Numeric(),
}
SIZES = {"user": 5, "city": 9, "tags": 5, "age": 2}


def encoder_of(**names: str) -> Encoder:
    """The encoder of four fields, under other names where such are given."""
    fields = tuple(FittedField(name=names.get(name, name), kind=kind, size=SIZES[name]) for name, kind in KINDS.items())
    return Encoder(
        FeatureSchema(fields=fields), {names.get(name, name): Vocabulary.of(values) for name, values in VALUES.items()}
    )


ENCODER = encoder_of()
DECODER, CAREFUL = Decoder(ENCODER), Decoder(ENCODER)
CAREFUL._decoders = {}  # without msgspec

REQUESTS = {"candidates": CandidatesRequest} | {str(verb): action.request for verb, action in ACTIONS.items()}

Outcome = tuple[Any, ...]


def outcome(decoder: Decoder, verb: str, raw: bytes, encoder: Encoder = ENCODER) -> Outcome:
    """What a body comes to: everything that was read, encoded, or else the refusal."""
    try:
        asked = getattr(decoder, verb)(raw, limit=3)
        asked = (asked,) if isinstance(asked, Table) else asked
        tables = (each.table if isinstance(each, Rows) else each for each in asked)
        return tuple(encoded(encoder, each) if isinstance(each, Table) else each for each in tables)
    except (BodyUnreadable, BodyRefused, InputError) as error:
        return "refused", type(error), str(error)


def encoded(encoder: Encoder, table: Table) -> Outcome:
    found = encoder.encode(table.columns, table.length)
    present = [column is not None for column in table.columns]
    return table.length, present, found.ids.tolist(), found.values.tolist()


def check(verb: str, raw: bytes) -> bool:
    """The same from both readers, and without a second look where the body is taken. Whether it is."""
    found = outcome(CAREFUL, verb, raw)
    assert outcome(DECODER, verb, raw) == found
    taken = found[0] != "refused"
    if taken:
        DECODER._decoders[REQUESTS[verb]][-1].decode(raw)
    return taken


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([1.0, -0.0, 1e300, 5e-324, 10.0**22, 0.5, float("nan"), float("inf")])
    | st.sampled_from(["u1", "1", "fun", "", "é😀", "\ud800", "\x00"])
)
CELLS = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(st.sampled_from(["fun", "new", "x"]), SCALARS)
NAMES = st.sampled_from(["user", "city", "tags", "age"])
NAMES_OR_OTHERS = NAMES | st.sampled_from(["other", "f0", ""])
GOOD = st.fixed_dictionaries(
    {},
    optional={
        "user": st.none() | st.booleans() | st.integers() | st.sampled_from(["u1", "nobody", "é"]),
        "city": st.none() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
        "tags": st.none() | st.lists(st.sampled_from(["fun", "é", 1, True, 2.0]), max_size=3) | st.just({"fun": 0.5}),
        "age": st.none() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False),
    },
)
ROWS = st.dictionaries(NAMES_OR_OTHERS, CELLS, max_size=3) | GOOD
BATCHES = st.lists(GOOD, max_size=4) | st.lists(ROWS | SCALARS, max_size=4) | SCALARS
COLUMNS = st.dictionaries(NAMES_OR_OTHERS, st.lists(CELLS, max_size=4) | SCALARS, max_size=3) | SCALARS
KEYS: dict[str, st.SearchStrategy[Any]] = {
    "instances": BATCHES,
    "candidates": BATCHES,
    "columns": COLUMNS,
    "context": ROWS | SCALARS,
    "candidate_set": SCALARS,
    "logits": SCALARS,
    "top_k": SCALARS | st.integers(-1, 5),
    "signature_name": SCALARS,
    "other": SCALARS,
}


def bodies(*likely: str) -> st.SearchStrategy[Any]:
    """Objects that hold the likely keys, as they should be, or any keys with anything under them."""
    good = {
        "instances": st.lists(GOOD, min_size=1, max_size=3),
        "context": GOOD.map(lambda row: {}),
        "logits": st.booleans(),
        "candidate_set": st.sampled_from(["apps", "é"]),
    }
    plain = st.fixed_dictionaries({key: good.get(key, st.lists(GOOD, min_size=1, max_size=3)) for key in likely})
    return plain | st.fixed_dictionaries({}, optional=KEYS) | SCALARS


@pytest.mark.parametrize(
    ("verb", "likely"),
    [
        ("predict", ["instances", "logits"]),
        ("explain", ["instances"]),
        ("rank", ["context", "candidates"]),
        ("rank", ["context", "candidate_set"]),
        ("candidates", ["candidates"]),
    ],
)
def test_both_readers_take_the_same_bodies(verb: str, likely: list[str]) -> None:
    seen: set[bool] = set()

    @settings(max_examples=150, deadline=None)
    @given(body=bodies(*likely), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
    def run(body: Any, ascii_only: bool, indent: int | None) -> None:
        text = json.dumps(body, ensure_ascii=ascii_only, indent=indent)
        seen.add(check(verb, text.encode("utf-8", "surrogatepass")))

    run()
    assert seen == {True, False}


ROW = b'{"instances": [{%s}]}'
TAKEN = [
    ROW % b"",
    ROW % b'"user": 1.0, "age": -0',
    ROW % b'"user": 18446744073709551616',
    ROW % (b'"user": ' + b"9" * 4000),
    ROW % b'"age": 1e-400',
    ROW % b'"age": 1.7976931348623157E+308',
    ROW % b'"\\u0075ser": "\\ud83d\\ude00\\u0000"',
    ROW % b'"tags": {"fun": -1, "\\u00e9": 1e6}',
    ROW % b'"user": "a:b", "city": "::", "age": null, "tags": {":": 1}',
    ROW % (b'"city": "' + b"x" * 1024 + b'"'),
    ROW % (b'"city": "' + "é".encode() * 1024 + b'"'),
    b' \n\t{"instances": [{}], "columns": null, "signature_name": null}\r\n',
    b'{"columns": {"user": ["u1", null], "tags": [null, []]}}',
]
REFUSED = [
    ROW % b'"age": 1e999',
    ROW % b'"user": -1e999',
    ROW % (b'"age": ' + b"9" * 5000),
    ROW % (b'"age": 1' + b"0" * 400),
    ROW % b'"age": true',
    ROW % b'"age": "1"',
    ROW % b'"age": NaN',
    ROW % b'"age": -Infinity',
    ROW % b'"age": 01',
    ROW % b'"age": 1.',
    ROW % b'"age": .5',
    ROW % b'"age": +1',
    ROW % b'"age": 0x1',
    ROW % b'"age": 1_0',
    ROW % b'"user": 1.5',
    ROW % b'"user": []',
    ROW % b'"user": "\xff"',
    ROW % b'"user": "\xed\xa0\x80"',
    ROW % b'"user": "\\udc00"',
    ROW % b'"user": "\\ud800x"',
    ROW % b'"user": "a\nb"',
    ROW % b'"user": "\\x41"',
    ROW % b"'user': 1",
    ROW % b'"user": 1,',
    ROW % b'"\xff": 1',
    ROW % b'"f0": 1',
    ROW % b'"user": "u1", "user": "u2"',
    ROW % b'"user": null, "user": null',
    ROW % b'"user": "u1", "\\u0075ser": "u1"',
    ROW % b'"user": ["no category"], "user": "u1"',
    ROW % b'"tags": {"fun": 1, "fun": 1}',
    ROW % (b'"city": "' + b"x" * 1025 + b'"'),
    ROW % (b'"tags": ["' + b"x" * 1025 + b'"]'),
    ROW % (b'"tags": {"' + b"x" * 1025 + b'": 1}'),
    b'{"instances": [{}], "instances": [{}]}',
    b'{"instances": [{}], "logits": true, "logits": false}',
    b'{"columns": {"user": ["u1"], "user": ["u1"]}}',
    ROW % b'"tags": "fun"',
    ROW % b'"tags": [null]',
    ROW % b'"tags": [["fun"]]',
    ROW % b'"tags": {"fun": null}',
    ROW % b'"tags": {"fun": true}',
    ROW % b'"tags": ["a", "b", "c", "d"]',
    ROW % (b'"user": ' + b"[" * 100_000 + b"]" * 100_000),
    ROW % (b'"tags": ' + b'{"a":' * 300 + b"1" + b"}" * 300),
    b'{"instances": [{}, {}, {}, {}]}',
    b'{"instances": []}',
    b'{"instances": [null]}',
    b'{"instances": [[]]}',
    b'{"instances": {}}',
    b'{"instances": null}',
    b'{"instances": [{}], "columns": {}}',
    b'{"instances": [{}], "logits": null}',
    b'{"instances": [{}], "logits": 1}',
    b'{"instances": [{}], "signature_name": 1}',
    b'{"instances": [{}], "other": 1}',
    b'{"instances": [{}]} x',
    b'{"instances": [{}]}\x00',
    b'{"instances": [{}]',
    b'\xef\xbb\xbf{"instances": [{}]}',
    b'{"columns": {"user": null}}',
    b'{"columns": {"user": ["u1"], "age": []}}',
    b'{"columns": {"user": ["u1", "u1", "u1", "u1"]}}',
    b'{"columns": {"other": ["u1"]}}',
    b'{"columns": {}}',
    b'{"columns": []}',
    b"[]",
    b"null",
    b"",
    b"\x00",
]


@pytest.mark.parametrize("raw", TAKEN)
def test_what_is_taken(raw: bytes) -> None:
    assert check("predict", raw)


@pytest.mark.parametrize("raw", REFUSED, ids=lambda raw: repr(raw[:60]))
def test_what_is_refused(raw: bytes) -> None:
    assert not check("predict", raw)


@pytest.mark.parametrize(("top_k", "taken"), [(b"1", True), (b"1" + b"0" * 30, True), (b"null", True)])
@pytest.mark.parametrize("verb", ["explain", "rank"])
def test_top_k_is_a_count(verb: str, top_k: bytes, taken: bool) -> None:
    rows = b'"instances": [{}]' if verb == "explain" else b'"context": {}, "candidates": [{}]'
    assert check(verb, b'{%s, "top_k": %s}' % (rows, top_k)) == taken
    for wrong in (b"0", b"-1", b"1.0", b"true", b'"1"', b"1e0", b"[]"):
        assert not check(verb, b'{%s, "top_k": %s}' % (rows, wrong))


def test_the_bodies_have_the_keys_of_the_document() -> None:
    for request in REQUESTS.values():
        described = request.model_json_schema()
        fields = msgspec.structs.fields(DECODER._decoders[request][-1].type)
        assert {field.encode_name for field in fields} == set(described["properties"])
        assert {field.encode_name for field in fields if field.required} == set(described.get("required", ()))


def test_a_ranking_knows_which_fields_stand_where() -> None:
    asked = DECODER.rank(b'{"context": {"age": null}, "candidates": [{"user": "u1"}, {"tags": null}]}', limit=3)
    assert asked == CAREFUL.rank(b'{"context": {"age": null}, "candidates": [{"user": "u1"}, {"tags": null}]}', limit=3)
    assert asked == RankAsked(
        Table([None, None, None, (None,)], 1), Table([["u1", None], None, [None, None], None], 2), None, None
    )


def members(*likely: tuple[str, Any]) -> str:
    """An object with exactly these members, twice or not."""
    return "{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in likely) + "}"


@given(
    row=st.lists(
        st.tuples(st.sampled_from(["user", "city"]), st.sampled_from(["u1", "a:b", "", None, 0, True, ":"]))
        | st.tuples(st.just("tags"), st.sampled_from([[], ["a:b"], ["fun"], {"fun": 1}, {"a:": 2, "b": 1}, None]))
        | st.tuples(st.just("age"), st.sampled_from([0, 1.5, None])),
        max_size=4,
    ),
    at=st.integers(0, 2),
)
@settings(max_examples=300, deadline=None)
def test_a_key_is_taken_once(row: list[tuple[str, Any]], at: int) -> None:
    rows = ["{}", "{}"]
    rows.insert(at, members(*row))
    raw = f'{{"instances": [{", ".join(rows)}], "logits": false}}'.encode()
    found = outcome(DECODER, "predict", raw)
    names = [name for name, _ in row]
    twice = next((name for name in names if names.count(name) > 1), None)
    assert (found[0] == "refused") == (twice is not None)
    if twice is not None:
        said = f"key instances: instance {at}: field {twice}: expected each key once, received a key twice"
        assert found == ("refused", BodyRefused, said)


@pytest.mark.parametrize("name", ['q"uote', "back\\slash", "line\nbreak", "a b", "é", "f1"])
def test_a_field_may_have_any_name(name: str) -> None:
    encoder = encoder_of(user=name)
    raw = json.dumps({"instances": [{name: "u1"}, {name: "nobody"}, {}]}).encode()
    found = outcome(Decoder(encoder), "predict", raw, encoder)
    assert found == outcome(DECODER, "predict", raw.replace(json.dumps(name).encode(), b'"user"'))
    assert found[0] != "refused"
