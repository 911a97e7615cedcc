"""Bodies that are wrong in some hundred ways, each with a word in it that no answer may repeat, for every address that
takes one; and what every answer has to be.
"""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from service.errors import MEDIA_TYPE, Problem

CANARY: Final = "c4n4ry"
WORD: Final = CANARY.encode()
REFUSED_LATER: Final = {503, 507}  # by a service that is well

MODEL: Final = "/v1/models/tiny-fm"
OIP: Final = "/v2/models/tiny-fm"
SET: Final = f"{MODEL}/candidate-sets/{CANARY}"
LOAD: Final = "/v2/repository/models/tiny-fm/load"
INDEX: Final = "/v2/repository/index"


class Asked(NamedTuple):
    """A request: `header_length` is where the JSON ends that binary data stands behind."""

    method: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def _deep(levels: int) -> bytes:
    return b"[" * levels + b'"c4n4ry"' + b"]" * levels


# Tokens for the place of a value.
VALUES: Final = [
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1e-999", b"-0", b"01", b"+1", b".5", b"0x10", b"1.5"),
    *(b"9" * 400, b"9" * 5000, b"-" + b"9" * 5000, b"1e400", b"true", b"null", b"nul", b"c4n4ry", b"'c4n4ry'", b"{}"),
    *(b'"c4n4ry"', b'"c4n4ry\\ud800"', b'"c4n4ry\xed\xa0\x80"', b'"c4n4ry\xff"', b'"c4n4ry\\u0000"', b'"c4n4ry\x00"'),
    *(b'"c4n4ry\\x"', b'"c4n4ry\n"', b'"c4n4ry', b'""', b'"' + WORD * 300 + b'"', b"[]", b"[[]]", b'["c4n4ry", null]'),
    *(b'["c4n4ry", "a", "b", "c", "d"]', b'{"c4n4ry": 1}', b'{"c4n4ry": 1e308}', b'{"c4n4ry": NaN}', b'{"": {}}'),
    *(b'{"c4n4ry": 1, "c4n4ry": 2}', b'{"c4n4ry": "heavy"}', b'{"\\ud800c4n4ry": 1}', _deep(20), _deep(40), _deep(900)),
    *(_deep(5000), b'{"c4n4ry":' * 40 + b"1" + b"}" * 40, b"", b"/* c4n4ry */ 1", b"[1, 2", b"1 1", b"-"),
]
ROWS: Final = [
    *(b"%s", b'{"%s": %s, "c4n4ry": 1}', b'{"%s": [%s]}', b'{"%s": {"instances": %s}}'),
    *(b'{"%s": [{"user": %s}]}', b'{"%s": [{"tags": %s}]}', b'{"%s": [{"tags": [%s]}]}', b'{"%s": [{"age": %s}]}'),
    *(b'{"%s": [{"tags": {"c4n4ry": %s}}]}', b'{"%s": [{}, {"user": "c4n4ry", "user": %s}]}', b'{"%s": [{"x": %s}]}'),
    *(
        b'{"%s": [{"c4n4ry": %s}]}',
        b'{"%s": [{}], "logits": %s}',
        b'{"%s": [{}], "top_k": %s}',
        b'{"%s": [{}], "": %s}',
    ),
    *(b'{"%s": [{}], "signature_name": %s}', b'{"%s": [{}], "explain": %s}', b'{"%s": [{}], "candidate_set": %s}'),
    *(b'{"%s": [{}], "columns": %s}', b'{"%s": [{}], "context": %s}', b'{"%s": [{}], "context": {"c4n4ry": %s}}'),
]
COLUMNS: Final = [
    b'{"columns": %s}',
    b'{"columns": {"user": %s}}',
    b'{"columns": {"tags": [%s]}}',
    b'{"columns": {"age": [%s], "user": ["c4n4ry"]}}',
    b'{"columns": {"user": ["a"], "user": [%s]}}',
    b'{"columns": {"user": ["c4n4ry"]}, "context": {"age": %s}}',
]
TENSOR: Final = b'{"inputs": [{"name": "%s", "datatype": "%s", "shape": %s, "data": %s%s}]%s}'
TENSORS: Final = [
    b"%s",
    b'{"inputs": %s}',
    b'{"inputs": [%s]}',
    TENSOR % (b"user", b"BYTES", b"[1]", b"[%s]", b"", b""),
    TENSOR % (b"user", b"BYTES", b"[1, 1]", b"[[%s]]", b"", b""),
    TENSOR % (b"tags", b"BYTES", b"[1, 2]", b'["c4n4ry", %s]', b"", b""),
    TENSOR % (b"age", b"FP32", b"[1]", b"[%s]", b"", b""),
    TENSOR % (b"age", b"FP64", b"[2]", b"[1, %s]", b"", b""),
    TENSOR % (b"age", b"INT8", b"[1]", b"[%s]", b"", b""),
    TENSOR % (b"ids", b"INT64", b"[1, 6]", b"[1, 23, 37, 0, 0, %s]", b"", b""),
    TENSOR % (b"age", b"FP32", b"[%s]", b"[1]", b"", b""),
    TENSOR % (b"age", b"FP32", b"[1, %s]", b"[1]", b"", b""),
    TENSOR % (b"age", b"FP32", b"%s", b"[1]", b"", b""),
    TENSOR % (b"age", b"FP32", b"[1]", b"%s", b"", b""),
    TENSOR % (b"age", b"c4n4ry", b"[1]", b"[%s]", b"", b""),
    TENSOR % (b"c4n4ry", b"FP32", b"[1]", b"[%s]", b"", b""),
    TENSOR % (b"age", b"FP32", b"[1]", b"[1]", b', "parameters": %s', b""),
    TENSOR % (b"age", b"FP32", b"[1]", b"[1]", b', "parameters": {"binary_data_size": %s}', b""),
    TENSOR % (b"age", b"FP32", b"[1]", b"[1]", b', "c4n4ry": %s', b""),
    TENSOR % (b"age", b"FP32", b"[1]", b"[1]", b', "data": [%s]', b""),
    TENSOR % (b"age", b"FP32", b"[1]", b"[1]", b"", b', "outputs": %s'),
    TENSOR % (b"age", b"FP32", b"[1]", b"[1]", b"", b', "outputs": [{"name": %s}]'),
    TENSOR % (b"age", b"FP32", b"[1]", b"[1]", b"", b', "parameters": {"c4n4ry": %s}'),
    TENSOR % (b"age", b"FP32", b"[1]", b"[1]", b"", b', "parameters": {"triton_c4n4ry": 1}, "x": %s'),
    TENSOR % (b"age", b"FP32", b"[1]", b"[1]", b"", b', "c4n4ry": %s'),
]
CONTROL: Final = [b"%s", b'{"parameters": %s}', b'{"parameters": {"config": %s}}', b'{"c4n4ry": %s}', b'{"ready": %s}']
RAW: Final = [
    *(b"", b"c4n4ry", b"\x00", b"\xff\xfec4n4ry", b"\xef\xbb\xbf{}", b"{}", b"[]", b"null", b"0", b'"c4n4ry"', b"{"),
    *(text.encode(code) for text in ('{"instances": [{"user": "c4n4ry"}]}',) for code in ("utf-16", "utf-32", "utf-7")),
    *(
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"]" * 100_000,
        b'"' * 100_000,
        b"\\" * 100_000,
        b" " * 100_001,
        b"[]," * 30_000,
    ),
    *(b'{"instances": [' + b'{"user": "c4n4ry"}, ' * 4100 + b"{}]}", b'{"instances": [' + b"1, " * 30_000 + b"1]}"),
    *(json.dumps({f"c4n4ry{at}": at for at in range(5000)}).encode(), b"ARROW1\x00\x00c4n4ry", b"\xff\xff\xff\xff\x10"),
    *(b"\xff\xff\xff\xff\xff\xff\xff\x7fc4n4ry", b"PK\x03\x04c4n4ry", b"\x1f\x8bc4n4ry", b"<c4n4ry/>", b"user=c4n4ry"),
]
ARROW: Final = (("content-type", "application/vnd.apache.arrow.stream"),)


def _filled(templates: list[bytes], *before: bytes) -> Iterator[bytes]:
    for template in templates:
        for value in VALUES:
            yield template % (*before, value) if template != b"%s" else value


def _binary() -> Iterator[Asked]:
    """Tensors behind the JSON whose sizes, shapes and lengths are lies."""
    texts = b"\x06\x00\x00\x00c4n4ry"
    for name, datatype, shape, size, data in (
        ("user", "BYTES", [1], 10, texts),
        ("user", "BYTES", [2], 10, texts),
        ("user", "BYTES", [1], 9, texts),
        ("user", "BYTES", [1], 11, texts),
        ("user", "BYTES", [1], -1, texts),
        ("user", "BYTES", [1], 10**30, texts),
        ("user", "BYTES", [1], 10, b"\xff\xff\xff\xffc4n4ry"),
        ("user", "BYTES", [1], 10, b"\x07\x00\x00\x00c4n4ry"),
        ("user", "BYTES", [1], 10, b"\x06\x00\x00\x00c4n4r\xff"),
        ("user", "BYTES", [2**31, 2**31], 10, texts),
        ("user", "BYTES", [10**4000, 10**4000], 10, texts),
        ("user", "BYTES", [], 10, texts),
        ("user", "BYTES", [0], 0, b""),
        ("user", "BYTES", [-1], 10, texts),
        ("age", "FP32", [1], 4, b"\x00\x00\xc0\x7f"),
        ("age", "FP32", [1], 4, b"\x00\x00\x80\x7f"),
        ("age", "FP32", [1], 3, b"c4n"),
        ("age", "FP32", [2**62, 4], 4, b"c4n4"),
        ("age", "FP32", [2**31 - 1, 2**31 - 1], 4, b"c4n4"),
        ("age", "FP32", [10**4000, 10**4000], 4, b"c4n4"),
        ("age", "FP16", [3], 6, WORD),
        ("age", "BOOL", [6], 6, WORD),
        ("ids", "INT64", [1, 6], 48, WORD * 8),
        ("ids", "INT64", [1, 6], 48, b"\xff" * 48),
        ("ids", "UINT64", [1, 6], 48, b"\x00" * 48),
        ("c4n4ry", "FP32", [1], 4, b"c4n4"),
    ):
        tensor = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [tensor]}).encode()
        for length in (len(head), len(head) - 1, len(head) + 1, 0, 10**9):
            yield Asked("POST", f"{OIP}/infer", head + data, (("inference-header-content-length", str(length)),))
    for length in ("c4n4ry", "-1", "9" * 5000, "1.0", ""):
        yield Asked("POST", f"{OIP}/infer", b"{}", (("inference-header-content-length", length),))


def requests() -> Iterator[Asked]:
    """All of them."""
    for verb in ("predict", "explain"):
        bodies = [*_filled(ROWS, b"instances"), *_filled(COLUMNS), *RAW] if verb == "predict" else _some(b"instances")
        yield from (Asked("POST", f"{MODEL}:{verb}", body) for body in bodies)
    for body in [*_filled(ROWS, b"candidates"), *_filled(COLUMNS), *RAW]:
        yield Asked("POST", f"{MODEL}:rank", b'{"context": {}, ' + body[1:] if b'"context"' not in body else body)
    yield from (Asked("PUT", SET, body) for body in _some(b"candidates"))
    yield from (Asked("POST", f"{OIP}/infer", body) for body in [*_filled(TENSORS), *RAW])
    yield from _binary()
    for path in (LOAD.replace("tiny-fm", CANARY), INDEX):
        yield from (Asked("POST", path, body) for body in [*_filled(CONTROL), *RAW])
    yield from (Asked("POST", f"{MODEL}:predict", body, ARROW) for body in [*RAW, *VALUES])
    yield from encoded()


def _some(key: bytes) -> list[bytes]:
    return [*_filled(ROWS[:12], key), *_filled(COLUMNS[:3]), *RAW]


def encoded() -> Iterator[Asked]:
    """Bodies that are compressed, or say so; some unfold to gigabytes."""
    good = b'{"instances": [{"user": "c4n4ry"}]}'
    whole, stream = gzip.compress(good), zlib.compress(good)
    bomb = gzip.compress(b"[" * 10**8)
    bodies = (good, whole, stream, whole[:-1], whole[:10], whole + b"c4n4ry", whole * 2, bomb, gzip.compress(bomb), b"")
    bodies = (*bodies, bytes([*whole[:-8], *b"\0" * 8]), gzip.compress(b"\xff" + good), gzip.compress(b"[" * 5000))
    for coding in ("gzip", "deflate", "x-gzip", "GZIP", "identity", "br", "gzip, gzip", CANARY, "\xe9", ""):
        for body in bodies:
            for path in (f"{MODEL}:predict", f"{MODEL}:explain", f"{OIP}/infer", INDEX):
                yield Asked("POST", path, body, (("content-encoding", coding),))
            yield Asked("PUT", SET, body, (("content-encoding", coding),))
            yield Asked("POST", f"{MODEL}:predict", body, (("content-encoding", coding), *ARROW))


def mutated(count: int, *, seed: int) -> Iterator[Asked]:
    """Good bodies with bits flipped, cut, and spliced with each other."""
    draw = random.Random(seed)
    good = [
        (
            "POST",
            f"{MODEL}:predict",
            b'{"instances": [{"user": "c4n4ry", "tags": {"fun": 0.5}, "age": -1.5e1}], "logits": true}',
        ),
        (
            "POST",
            f"{MODEL}:explain",
            b'{"columns": {"user": ["c4n4ry", null], "tags": [["fun"], []], "age": [1, 2]}, "top_k": 3}',
        ),
        (
            "POST",
            f"{MODEL}:rank",
            b'{"context": {"user": "c4n4ry"}, "candidates": [{"app": "a1"}, {"app": "\\u00e9"}], "top_k": 1}',
        ),
        ("PUT", SET, b'{"candidates": [{"app": "c4n4ry", "tags": ["fun", "new"]}]}'),
        (
            "POST",
            f"{OIP}/infer",
            TENSOR % (b"user", b"BYTES", b"[2, 1]", b'["c4n4ry", "u1"]', b', "parameters": {}', b', "id": "7"'),
        ),
        ("POST", INDEX, b'{"ready": true, "c4n4ry": {"a": [1, 2]}}'),
    ]
    for _ in range(count):
        method, path, body = draw.choice(good)
        raw = bytearray(body)
        for _ in range(draw.randint(1, 2)):
            at = draw.randrange(len(raw) + 1)
            match draw.randrange(5):
                case 0 if raw:
                    raw[at % len(raw)] ^= 1 << draw.randrange(8)
                case 1:
                    del raw[at:]
                case 2:
                    other = draw.choice(good)[2]
                    raw[at:] = other[draw.randrange(len(other)) :]
                case 3:
                    raw[at:at] = draw.choice(VALUES)[:100]
                case _:
                    del raw[at : at + draw.randint(1, 5)]
        yield Asked(method, path, bytes(raw))


def wrong(asked: Asked, status: int, headers: dict[str, str], content: bytes) -> str | None:
    """What is wrong with an answer; None where it is what it should be."""
    if status >= 500 and status not in REFUSED_LATER:
        return f"{status}"
    if status < 400:
        return None
    if WORD in content or any(CANARY in value for value in headers.values()):
        return "what was sent comes back"
    is_oip = asked.path.startswith("/v2")
    expected = "application/json" if is_oip else MEDIA_TYPE
    if headers.get("content-type") != expected:
        return f"the type {headers.get('content-type')}"
    said = json.loads(content)
    if is_oip:
        return None if set(said) == {"error"} else "no {error}"
    return None if Problem.model_validate(said).status == status else "another status in the body"
