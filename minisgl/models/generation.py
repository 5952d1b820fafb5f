"""generation_config.json -> when a model's text ends, and how its authors want it sampled.

Knows config files. Does not know tokenizers: the caller passes the tokenizer's end-of-text id.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from minisgl.errors import MinisglError
from minisgl.models.config import ModelConfig, read_json, token_ids
from minisgl.request import SamplingParams

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationDefaults:
    """What holds for requests that do not say otherwise."""

    eos_ids: frozenset[int]
    sampling: SamplingParams


def generation_defaults(folder: Path, config: ModelConfig, tokenizer_eos_id: int | None) -> GenerationDefaults:
    """Read `folder`/generation_config.json, which may be absent.

    End-of-text ids: generation_config's, else config.json's; and always the tokenizer's. An explicit
    `"do_sample": false` means temperature 0. MinisglError for an id that is none and a sampling value out of range.
    """
    path = folder / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    try:
        eos_ids = token_ids(raw, "eos_token_id") or config.eos_ids
        sampling = SamplingParams(**{key: raw[key] for key in SAMPLING_KEYS if raw.get(key) is not None})
    except ValueError as error:
        raise MinisglError(f"{path}: {error}; correct the file or remove it") from error
    if tokenizer_eos_id is not None:
        eos_ids += (tokenizer_eos_id,)
    if raw.get("do_sample") is False:
        sampling = replace(sampling, temperature=0.0)
    return GenerationDefaults(frozenset(eos_ids), sampling)
