"""A request gets the same answer alone and in a crowd, whatever the others ask for, and whoever is aborted."""

import random
from dataclasses import replace

import pytest

from minisgl import LLM, SamplingParams
from tests.tiny_models import VOCAB_SIZE, make

GPU = {"device": "cuda", "dtype": "bfloat16"}
CASES = [
    pytest.param(200, {"device": "cpu", "dtype": "float32"}, id="cpu"),
    pytest.param(200, {**GPU, "deterministic": True}, id="gpu-deterministic", marks=pytest.mark.gpu),
]


def a_request(rng: random.Random, system: list[int]) -> tuple[list[int], SamplingParams]:
    """A prompt of 1 to 120 tokens, some behind a common prefix, and some features."""
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((1, 5, 20, 60, 120)))]
    if rng.random() < 0.3:
        prompt = system + prompt[:30]
    asked = {"temperature": rng.choice((0.0, 0.7, 1.5)), "seed": rng.randrange(1000), "ignore_eos": True}
    asked["max_tokens"] = rng.choice((1, 3, 10, 60))
    features = {
        "top_k": rng.choice((1, 5, 50)),
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": -0.3,
        "logit_bias": {rng.randrange(VOCAB_SIZE): rng.choice((-100.0, 2.0))},
        "bad_words": ["the", "in"],
        "logprobs": rng.choice((0, 2, 20)),
        "prompt_logprobs": 1,
        "stop": ["e", "in"],
        "stop_token_ids": [rng.randrange(VOCAB_SIZE)],
    }
    for name in rng.sample(sorted(features), rng.choice((0, 0, 1, 3))):
        asked[name] = features[name]
    if "stop_token_ids" in asked:
        asked["min_tokens"] = asked["max_tokens"]
    params = SamplingParams(**asked)
    if rng.random() < 0.15:
        formats = pytest.importorskip("minisgl.structured")
        params = replace(params, bad_words=(), response_format=formats.ResponseFormat(regex="[a-f]{2,9}x"))
    return prompt, params


def logprobs_of(result):
    return [one.logprob for one in [*(result.logprobs or ()), *(result.prompt_logprobs or ())]]


def is_same(result, expected, error):
    answer, wanted = ((one.token_ids, one.text, one.finish_reason) for one in (result, expected))
    return answer == wanted and logprobs_of(result) == pytest.approx(logprobs_of(expected), rel=0, abs=error)


@pytest.mark.parametrize("count, options", CASES)
def test_alone_and_in_a_crowd(tmp_path, count, options):
    pytest.importorskip("llguidance")
    folder = make("qwen3", tmp_path / "model")
    rng = random.Random(0)
    system = [rng.randrange(VOCAB_SIZE) for _ in range(48)]
    asked = [a_request(rng, system) for _ in range(count)]
    options = {**options, "page_size": 16}
    with LLM(folder, **options, max_running=1, cache="none", overlap=False, num_pages=24) as llm:
        expected = llm.generate(*map(list, zip(*asked, strict=True)))
    with LLM(folder, **options, max_running=16, max_step_tokens=96, num_pages=24) as llm:
        requests = [llm.new_request(*one, index=index) for index, one in enumerate(asked)]
        aborted = set(rng.sample(requests, count // 5))
        waiting, found = list(requests), {}
        while waiting or llm.num_unfinished:
            burst = rng.randrange(12)
            llm.submit(waiting[:burst])
            waiting = waiting[burst:]
            found |= {request.index: result for request, result in llm.step()}
            running = [request for request in llm.core.scheduler.running if request in aborted]
            if running and rng.random() < 0.5:
                llm.abort(rng.choice(running))
        error = 0 if llm.config.deterministic else 1e-4
        for index, result in found.items():
            assert is_same(result, expected[index], error), (asked[index], result, expected[index])
        assert count - count // 5 <= len(found) < count
        assert llm.core.scheduler.num_preemptions > 0
        llm.reset_prefix_cache()
        assert llm.core.scheduler.pool.num_free == llm.core.scheduler.pool.num_pages
