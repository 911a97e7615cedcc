"""infer: tensors in, tensors out, as the Open Inference Protocol has them."""

import numpy as np

from bundle import EncodedRows
from service import tensors
from service.batcher import Scored
from service.errors import BodyRefused, Refusal
from service.messages import Reply
from service.oip_messages import InferAnswer
from service.runtime import Runtime
from service.settings import Settings
from service.signature import IDS, OUTPUT_NAMES
from service.tensors import Asked


def read(loaded: Runtime, body: bytes, settings: Settings, *, header_length: int | None) -> tuple[EncodedRows, Asked]:
    """The encoded rows of a body, and what is asked of them; `header_length` is that of the JSON, where it is not all.

    Raises BodyUnreadable, BodyRefused and InputError.
    """
    if header_length == 0:
        asked = _raw(loaded, body)
    else:
        asked = tensors.read(body, header_length=header_length, outputs=OUTPUT_NAMES)
    longest = loaded.longest if len(body) > loaded.longest else None
    return loaded.signature.encode(asked.inputs, limit=settings.max_rows, longest=longest), asked


def answer(loaded: Runtime, scored: Scored, asked: Asked) -> Reply:
    """The answer to one request."""
    loaded.count_request("infer", len(scored.predictions))
    said = InferAnswer(
        model_name=loaded.manifest.name,
        model_version=str(loaded.manifest.version),
        parameters={"digest": loaded.digest, "unknown": sum(map(bool, scored.unknown))},
        outputs=[],
        id=asked.id,
    )
    arrays = (np.array(scored.predictions), np.array(scored.logits, np.float32))
    content, header_length = tensors.write(said, dict(zip(OUTPUT_NAMES, arrays, strict=True)), asked.outputs)
    if header_length is None:
        return Reply(content, rows=len(arrays[0]))
    length = (b"inference-header-content-length", b"%d" % header_length)
    return Reply(content, ((b"content-type", b"application/octet-stream"), length), len(arrays[0]))


def _raw(loaded: Runtime, body: bytes) -> Asked:
    """A body that is the ids of one row, and no JSON."""
    if loaded.signature.graph != (IDS,):
        expected = "JSON before the binary data: this model takes values beside ids"
        raise BodyRefused(Refusal(key="inputs", expected=expected, received="binary data alone"))
    return tensors.raw(body, name=IDS, datatype="INT64", outputs=OUTPUT_NAMES)
