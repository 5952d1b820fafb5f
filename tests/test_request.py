"""What a request is made of: its parameters, and the token ids of its prompt."""

import numpy as np
import pytest

from minisgl.core import DEFAULTS
from minisgl.llm import LLM
from minisgl.request import SamplingParams


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0, top_k=5, seed=3, stop="end", stop_token_ids=[2]),
        SamplingParams(max_tokens=1, ignore_eos=True, logit_bias={4: -1.5}, n=2, echo=False),
    ],
)
def test_parameters_left_open_are_the_defaults(params):
    before = dict(vars(params))
    full = params.over(DEFAULTS, seed=7)
    assert full == DEFAULTS.merge({"seed": 7, **{name: value for name, value in before.items() if value is not None}})
    assert vars(params) == before


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2, 3), range(1, 4), np.arange(1, 4, dtype=np.uint8)], ids=repr)
def test_ids_come_in_any_sequence(prompt):
    with LLM(device="cpu", num_pages=4) as llm:
        request = llm.new_request(prompt, SamplingParams(), index=0)
    assert request.tokens[: request.num_prompt].tolist() == [1, 2, 3]
