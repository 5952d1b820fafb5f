import json
import re

import pytest

from minisgl.errors import MinisglError
from minisgl.models.config import ModelConfig
from minisgl.models.generation import generation_defaults
from minisgl.request import SamplingParams


def defaults(folder, generation=None, config_eos=None, tokenizer_eos=None):
    raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 1, "eos_token_id": config_eos}
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return generation_defaults(folder, ModelConfig.from_dict(raw), tokenizer_eos)


@pytest.mark.parametrize(
    "generation, config_eos, tokenizer_eos, expected",
    [
        (None, None, None, set()),
        (None, 2, None, {2}),
        (None, [2, 3], 4, {2, 3, 4}),
        ({"eos_token_id": 5}, 2, None, {5}),
        ({"eos_token_id": [5, 6]}, 2, 5, {5, 6}),
        ({"eos_token_id": None}, 2, 7, {2, 7}),
        ({"eos_token_id": 0}, 2, None, {0}),
    ],
)
def test_end_of_text_ids(tmp_path, generation, config_eos, tokenizer_eos, expected):
    assert defaults(tmp_path, generation, config_eos, tokenizer_eos).eos_ids == expected


@pytest.mark.parametrize(
    "generation, expected",
    [
        (None, SamplingParams()),
        ({"bos_token_id": 1}, SamplingParams()),
        (
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
                "min_p": 0.1,
                "repetition_penalty": 1.05,
            },
            SamplingParams(temperature=0.7, top_p=0.8, top_k=20, min_p=0.1, repetition_penalty=1.05),
        ),
        ({"temperature": None, "top_k": 5}, SamplingParams(top_k=5)),
        ({"do_sample": False, "temperature": 0.7}, SamplingParams(temperature=0.0)),
    ],
)
def test_sampling(tmp_path, generation, expected):
    assert defaults(tmp_path, generation).sampling == expected


@pytest.mark.parametrize(
    "generation, reason",
    [
        ({"top_p": 2}, "top_p is 2"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [2, [3]]}, "[2, [3]]"),
    ],
)
def test_a_value_that_cannot_be_used_names_the_file(tmp_path, generation, reason):
    with pytest.raises(MinisglError, match=rf"generation_config.json: .*{re.escape(reason)}"):
        defaults(tmp_path, generation)
