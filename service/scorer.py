"""predict: rows in, predictions out."""

import numpy as np
from numpy.typing import NDArray

from service.messages import PredictAnswer, PredictRequest, Unknown
from service.runtime import Runtime
from service.settings import Settings


def predict(loaded: Runtime, request: PredictRequest, settings: Settings) -> PredictAnswer:
    encoded = loaded.encode(request, limit=settings.max_rows)
    unknown = loaded.count(encoded, "predict")
    logits = loaded.logits(encoded)
    answer = PredictAnswer(
        model=loaded.manifest.name,
        version=loaded.manifest.version,
        digest=loaded.digest,
        predictions=loaded.manifest.predictions(logits).tolist(),
        unknown=_named(unknown, loaded.schema.names),
    )
    return answer.model_copy(update={"logits": logits.tolist()}) if request.logits else answer


def _named(unknown: NDArray[np.bool_], names: tuple[str, ...]) -> list[Unknown]:
    """The rows of [B, F] that hold an unknown value, with the fields by name."""
    return [
        Unknown(instance=at, fields=[names[f] for f in np.flatnonzero(unknown[at]).tolist()])
        for at in np.flatnonzero(unknown.any(axis=1)).tolist()
    ]
