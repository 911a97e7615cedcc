"""How deep the arrays and objects of a body lie in each other, told from its bytes alone."""

from typing import Final

import numpy as np

from service.errors import BodyUnreadable

DEPTH: Final = 32  # no request that means anything needs more than 5
FIRST_BYTES: Final = 65_536
ROUND: Final = bytes.maketrans(b"{}", b"[]")
OTHERS: Final = bytes(set(range(256)) - set(b'[]{}"'))
BETWEEN: Final = ord("\\")  # one more than [, one less than ]


def check_depth(raw: bytes) -> None:
    """Raise BodyUnreadable where a body has more than DEPTH levels; what is no JSON may pass."""
    if raw.count(b"[") + raw.count(b"{") <= DEPTH:
        return
    if _is_deep(raw[:FIRST_BYTES]) or (len(raw) > FIRST_BYTES and _is_deep(raw)):
        raise BodyUnreadable(f"the body is nested deeper than {DEPTH} levels")


def _is_deep(raw: bytes) -> bool:
    shape = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(ROUND, OTHERS)
    if b'"' in shape:  # without two side by side, what stands between quotes is still between quotes
        shape = b"".join(shape.replace(b'""', b"").split(b'"')[::2])
    levels = np.cumsum(BETWEEN - np.frombuffer(shape, np.int8), dtype=np.int32)
    return bool(levels.max(initial=0) > DEPTH)
