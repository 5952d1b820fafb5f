"""/v1/embeddings: its bodies and its object.

    https://platform.openai.com/docs/api-reference/embeddings

Knows OpenAI's form, and "pooling" besides it. Does not know how vectors are made.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np

from minisgl.openai.bodies import LABELS, read_prompts
from minisgl.openai.fields import Fields, quoted
from minisgl.request import Pooling


@dataclass(frozen=True)
class AskedEmbeddings:
    """A body, read."""

    model: str
    prompts: tuple[str | list[int], ...]
    pooling: Pooling
    as_base64: bool


def read_embeddings(body: Any) -> AskedEmbeddings:
    """A body; FieldError names the key that is wrong."""
    fields = Fields(body)
    model, prompts = fields.take("model", str, ""), read_prompts(fields, "input")
    form, pooling = fields.take("encoding_format", str, "float"), fields.take("pooling", str, "last")
    if form not in ("float", "base64"):
        fields.refuse("encoding_format", f"is {quoted(form)}; it must be float or base64")
    if pooling not in get_args(Pooling):
        fields.refuse("pooling", f"is {quoted(pooling)}; it must be {' or '.join(get_args(Pooling))}")
    fields.end(LABELS)
    return AskedEmbeddings(model, prompts, cast(Pooling, pooling), form == "base64")


def embeddings_object(model: str, vectors: Sequence[bytes], prompt_tokens: int, *, as_base64: bool) -> dict[str, Any]:
    """The list of `vectors`, each the bytes of little-endian fp32."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector).decode() if as_base64 else np.frombuffer(vector, "<f4").tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "model": model, "data": data, "usage": usage}
