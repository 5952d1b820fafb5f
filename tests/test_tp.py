"""The whole engine on several ranks, on CPUs: the answers of one rank, and an end for all when one fails."""

import json
from pathlib import Path

import pytest
import torch

from minisgl import LLM, MinisglError, SamplingParams
from minisgl.worker import LeadingEngine
from tests.tiny_models import prompts_of_all_kinds

SMALL = {"device": "cpu", "dtype": "float32", "page_size": 16, "max_running": 4, "max_step_tokens": 64, "num_pages": 12}
MANY = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def _other_ranks_run_references():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("qwen3")


def params_of_all_kinds():
    """One for each of `prompts_of_all_kinds`."""
    form = pytest.importorskip("minisgl.structured").ResponseFormat
    pytest.importorskip("llguidance")
    return [
        SamplingParams(**{**MANY, "ignore_eos": False}, response_format=form(regex="[ab]{15}")),
        SamplingParams(**MANY, top_k=9, logprobs=3),
        SamplingParams(**MANY, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.2),
        SamplingParams(**MANY, prompt_logprobs=2),
        SamplingParams(**MANY, top_p=0.8, seed=2**63 - 1),
        SamplingParams(**{**MANY, "ignore_eos": False}, min_tokens=8, logit_bias={262: 9.0, 40: -100, 7: 3.5}),
        SamplingParams(**MANY, bad_words=["a", "the"], min_p=0.02),
        SamplingParams(temperature=0, max_tokens=20, logprobs=0),
        SamplingParams(temperature=0, max_tokens=3, n=2),
    ]


def answers(llm):
    """Of every kind, after a stream that is aborted in the middle."""
    prompts = prompts_of_all_kinds()
    for delta in llm.stream(prompts[2], SamplingParams(**MANY)):
        assert delta.token_ids
        break
    results = llm.generate(prompts, params_of_all_kinds())
    again = llm.generate(prompts[5:6], params_of_all_kinds()[5:6])
    scores = llm.score(prompts[4:6], [[1, 2, 3], [4]])
    vectors = [one.vector.tolist() for one in llm.embed(prompts[2:5], pooling="mean")]
    assert again[0].usage.cached_tokens
    logprobs = [[(one.logprob, one.top) for one in each.logprobs or each.prompt_logprobs or ()] for each in results]
    return (
        [([choice.token_ids for choice in one.choices], one.token_ids, one.usage) for one in results + again],
        [[token for _, top in each for token, _ in top] for each in logprobs],
        [number for each in logprobs for logprob, top in each for number in (logprob, *(value for _, value in top))],
        [number for one in scores for number in one.token_logprobs] + sum(vectors, []),
    )


@pytest.fixture(scope="module")
def expected(folder):
    with LLM(folder, **SMALL) as llm:
        found = answers(llm)
        assert llm.core.stats().preemptions
        return found


@pytest.mark.parametrize("tp, overlap", [(2, True), (4, False)])
def test_answers_are_those_of_one_rank(folder, expected, tp, overlap):
    with LLM(folder, **SMALL, tp=tp, overlap=overlap) as llm:
        assert isinstance(llm.core.engine, LeadingEngine)
        ids, top_ids, *numbers = answers(llm)
        assert llm.core.stats().preemptions
        processes = list(llm.core.engine._followers.processes.values())
    assert (ids, top_ids) == expected[:2]
    for found, of_one in zip(numbers, expected[2:], strict=True):
        assert found == pytest.approx(of_one, rel=1e-4, abs=1e-5)  # another order of the sums
    assert [process.returncode for process in processes] == [0] * (tp - 1)


def logprobs_of_examples(dtype, tp=1):
    """Of all prompt tokens that the demo model is asked with in the README's first command."""
    lines = (Path(__file__).parents[1] / "examples" / "prompts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["messages"][-1]["content"] for line in lines]
    with LLM(device="cpu", dtype=dtype, tp=tp) as llm:
        results = llm.generate(texts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    return torch.tensor([one.logprob for result in results for one in result.prompt_logprobs if one])


def test_bfloat16_is_as_near_to_float32_at_any_number_of_ranks():
    """Within the tolerance that the README names."""
    expected = logprobs_of_examples("float32")
    for tp in (1, 2, 4):
        errors = (logprobs_of_examples("bfloat16", tp) - expected).abs()
        assert errors.max() < 0.3 and errors.mean() < 0.05, tp


def test_deterministic_ranks(folder):
    """Alone and in a crowd, chunked and preempted: the same logits bit for bit, at one number of ranks."""
    prompts = prompts_of_all_kinds()
    params = [SamplingParams(**MANY, seed=seed, logprobs=20, prompt_logprobs=1) for seed in range(len(prompts))]
    with LLM(folder, **SMALL, tp=2, deterministic=True) as llm:
        results = llm.generate(prompts, params)
        assert llm.core.scheduler.num_preemptions
        for prompt, own, result in zip(prompts, params, results, strict=True):
            llm.reset_prefix_cache()
            [alone] = llm.generate(prompt, own)
            assert (alone.token_ids, alone.logprobs) == (result.token_ids, result.logprobs)
            assert alone.prompt_logprobs == result.prompt_logprobs


def test_a_rank_compiles_without_the_others(folder):
    with LLM(folder, **SMALL, tp=2) as llm:
        engine = llm.core.engine
        exchanges = engine.group.num_exchanges
        engine._compile_kernels(engine.config)
        assert engine.group.num_exchanges == exchanges
        assert llm.generate([1, 2, 3], SamplingParams(**MANY))[0].finish_reason == "length"


def test_a_rank_that_is_killed_ends_the_llm_and_not_the_process(folder):
    with LLM(folder, **SMALL, tp=2) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(**MANY))
        next(stream)
        with pytest.raises(MinisglError, match="close its other LLM"):
            LLM(folder, **SMALL, tp=2)
        llm.core.engine._followers.processes[1].kill()
        with pytest.raises(MinisglError, match="^rank 1 was killed by signal 9"):
            list(stream)
        with pytest.raises(MinisglError, match="rank 1 was killed by signal 9"):
            llm.generate([1, 2, 3])
    with LLM(folder, **SMALL, tp=2) as llm:
        assert llm.generate([1, 2, 3], SamplingParams(**MANY))[0].finish_reason == "length"


def test_refusals(folder):
    with pytest.raises(MinisglError, match="tp is 0"):
        LLM(folder, tp=0)
