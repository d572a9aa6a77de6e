"""From pooled states to the vector a client gets, and what of a request for it is refused."""

import numpy as np

from galley.errors import EngineFault, InvalidRequest
from galley.model.model import Model
from galley.types import Embed, Pooling

__all__ = ["finished", "pooling_of"]


def pooling_of(model: Model, embed: Embed) -> Pooling:
    """How texts are pooled for this request.

    Raises InvalidRequest when the model gives no embeddings, or not of that size: cutting a vector that was
    not trained to be cut gives a worse one without saying so.
    """
    spec, hidden = model.embedding, model.spec.hidden
    if spec.pooling is None:
        raise InvalidRequest(
            f"The model {model.name!r} is a reranker: it gives no embeddings.",
            param="model",
            code="model_not_supported",
        )
    wanted = embed.dimensions
    if wanted is not None and wanted != hidden and wanted not in spec.dimensions:
        can = ", ".join(str(size) for size in sorted({*spec.dimensions, hidden}))
        why = "" if spec.dimensions else ": its file does not say that it was trained to be cut"
        raise InvalidRequest(
            f"{model.name!r} gives vectors of {can} values, not of {wanted}{why}.",
            param="dimensions",
            code="unsupported_value" if spec.dimensions else "unsupported_parameter",
        )
    return embed.pooling or spec.pooling


def finished(pooled: bytes, embed: Embed) -> bytes:
    """Cut to the dimensions asked for, then brought to unit length where that is asked for; float32 in and
    out, float64 between. A vector of zeros stays one. Raises EngineFault for one that is not finite."""
    values = np.frombuffer(pooled, np.float32)[: embed.dimensions].astype(np.float64)
    length = float(np.sqrt(values @ values))
    if not values.size or not np.isfinite(length):
        raise EngineFault("The model's hidden states are not finite.")
    if embed.normalise and length > 0:
        values = values / length
    return values.astype(np.float32).tobytes()
