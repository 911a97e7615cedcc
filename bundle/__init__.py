"""The contract between training and service: schema, encoder, manifest, store. numpy and pydantic only.

>>> import bundle
>>> model = bundle.open("artifacts/demo-afm/1")      # doctest: +SKIP
>>> model.predict([{"user": "u17", "app": "a3"}])    # doctest: +SKIP
"""

from bundle.device import Gpu
from bundle.encoder import Encoder
from bundle.errors import BundleError, BundleInvalid, BundleUntrusted, InputError, RuntimeRefused, SchemaError
from bundle.predictor import Predictor, open
from bundle.rows import Coded, EncodedRows
from bundle.schema import Categorical, FeatureSchema, Multi, Numeric

__all__ = [
    "BundleError",
    "BundleInvalid",
    "BundleUntrusted",
    "Categorical",
    "Coded",
    "EncodedRows",
    "Encoder",
    "FeatureSchema",
    "Gpu",
    "InputError",
    "Multi",
    "Numeric",
    "Predictor",
    "RuntimeRefused",
    "SchemaError",
    "open",
]
