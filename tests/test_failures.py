"""The whole engine when steps and requests fail or are given up: others get what they would have got, and no page is
lost."""

import contextlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisgl import LLM, MinisglError, SamplingParams
from minisgl.forward import StepResults
from tests.tiny_models import prompts_of_all_kinds

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SMALL = {"dtype": "float32", "page_size": 16, "max_running": 4, "max_step_tokens": 64}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_an_abort_while_a_step_runs_frees_the_request_then(tiny_model, device, monkeypatch):
    """In the middle of a prompt, and of an answer; the steps in flight go on, and others get what they get alone."""
    looks, asked = [], []
    is_ready = StepResults.ready.fget

    def ready(results):  # never at once
        asked.append(results)
        return asked.count(results) > 1 and is_ready(results)

    monkeypatch.setattr(StepResults, "ready", property(ready))
    prompts = prompts_of_all_kinds()
    with LLM(tiny_model("qwen3"), device=device, **SMALL, num_pages=60) as llm:
        expected = [result.token_ids for result in llm.generate(prompts, GREEDY)]
        llm.reset_prefix_cache()
        requests = [llm.new_request(prompt, GREEDY, index=index) for index, prompt in enumerate(prompts)]
        aborted = {}  # by where it was

        def look():
            looks.append(len(llm.core._in_flight))
            for victim in requests:
                where = "answer" if victim.num_output >= 2 else "prompt" if victim.num_prompt >= 100 else None
                if victim.row is not None and where and where not in aborted:
                    free = llm.core.stats().free + llm.core.stats().cached
                    llm.core.abort(victim)
                    assert victim.pages == [] and llm.core.stats().free + llm.core.stats().cached > free
                    aborted[where] = victim

        llm.core.while_waiting = look
        llm.submit(requests)
        while llm.num_unfinished:
            llm.step()
        assert max(looks) == 2 and len(aborted) == 2
        for request, ids in zip(requests, expected, strict=True):
            if request in aborted.values():
                assert request.finish_reason == "abort"
            else:
                assert request.output_ids == ids
        llm.reset_prefix_cache()
        assert llm.core.scheduler.pool.num_free == llm.core.scheduler.pool.num_pages


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_request_whose_logits_are_nan_fails_alone(tiny_model, tmp_path, device, overlap):
    broken_id = 5
    shutil.copytree(tiny_model("qwen3"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][broken_id] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    prompts = [[id for id in prompt if id != broken_id] for prompt in prompts_of_all_kinds()]
    broken = [[1, 2, broken_id], [*prompts[2], broken_id, 3]]
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    asked = [plain, SamplingParams(temperature=1, max_tokens=20, logprobs=2, top_k=20, seed=0)]
    with LLM(tmp_path / "model", device=device, **SMALL, num_pages=60, overlap=overlap) as llm:
        expected = [result.token_ids for result in llm.generate(prompts, plain)]
        llm.reset_prefix_cache()
        results = llm.generate([*prompts, *broken, *broken], [plain] * len(prompts) + asked + asked[::-1])
        assert [result.token_ids for result in results[: len(prompts)]] == expected
        for result in results[len(prompts) :]:
            assert (result.finish_reason, result.token_ids, result.text) == ("error", [], "")
            assert result.error.type == "no_finite_logits" and "--dtype" in str(result.error)
        embedded = llm.embed([prompts[1], broken[0]])
        assert embedded[0].error is None and embedded[1].error.type == "no_finite_logits"
        scores = llm.score(prompts[:2] + broken, [[7, 8]] * 4)
        assert [score.error is None for score in scores] == [True, True, False, False]
        assert [result.token_ids for result in llm.generate(prompts, plain)] == expected
        llm.reset_prefix_cache()
        assert llm.core.scheduler.pool.num_free == llm.core.scheduler.pool.num_pages


def test_a_step_too_large_for_the_memory_makes_steps_smaller(tiny_model, monkeypatch, caplog):
    prompts = prompts_of_all_kinds()
    with LLM(tiny_model("qwen3"), device="cpu", **{**SMALL, "max_step_tokens": 200}, num_pages=64) as llm:
        expected = [result.token_ids for result in llm.generate(prompts, GREEDY)]
        llm.reset_prefix_cache()
        run = llm.core.engine.forward

        def run_small(step, **options):
            if step.num_tokens > 60:
                raise torch.OutOfMemoryError("no memory")
            return run(step, **options)

        monkeypatch.setattr(llm.core.engine, "forward", run_small)
        assert [result.token_ids for result in llm.generate(prompts, GREEDY)] == expected
        assert [record.args[1] for record in caplog.records] == [100, 50]
        llm.reset_prefix_cache()
        assert llm.core.scheduler.pool.num_free == llm.core.scheduler.pool.num_pages

        def never(step, **options):
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(llm.core.engine, "forward", never)
        with pytest.raises(MinisglError, match="smallest step"):
            llm.generate(prompts, GREEDY)


ONE_MASKED = (
    ["What is 2 + 3?", "Name a city."],
    [
        SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=9, response_format={"type": "regex", "regex": "[a-z]{9}"}),
    ],
)


@pytest.mark.parametrize("failing", [2, 4, 5, 7])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_step_that_fails_when_it_is_sampled_loses_no_result(monkeypatch, failing, error):
    """The step before it, whose tokens were handed out by then, ends a request."""
    with LLM(device="cpu", **SMALL) as llm:
        expected = [result.token_ids for result in llm.generate(*ONE_MASKED)]
        sample, calls = llm.core.engine.sample, []

        def sample_or_fail(*args):
            calls.append(args)
            if len(calls) == failing:
                raise error("no memory")
            return sample(*args)

        monkeypatch.setattr(llm.core.engine, "sample", sample_or_fail)
        requests = [
            llm.new_request(llm.tokenizer.encode(text), own, index=index)
            for index, (text, own) in enumerate(zip(*ONE_MASKED, strict=True))
        ]
        llm.submit(requests)
        ended = []
        for _ in range(40):
            with contextlib.suppress(RuntimeError):
                ended += llm.step()
        assert sorted((request.index, result.token_ids) for request, result in ended) == list(enumerate(expected))


def test_a_request_that_is_given_up_after_a_failure_is_not_told_later(monkeypatch):
    """Its result waits for the next call, which is another job's."""
    with LLM(device="cpu", **SMALL) as llm:
        sample, calls = llm.core.engine.sample, []

        def fail_once(*args):
            calls.append(args)
            if len(calls) == 5:
                raise RuntimeError("broken")
            return sample(*args)

        monkeypatch.setattr(llm.core.engine, "sample", fail_once)
        with pytest.raises(RuntimeError, match="broken"):
            llm.generate(*ONE_MASKED)
        lengths = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in (2, 6)]
        assert [result.usage.completion_tokens for result in llm.generate(["Hi", "Ho"], lengths)] == [2, 6]


@pytest.mark.parametrize("name", ["_share", "_give_pages"])
def test_an_interrupt_while_a_step_is_made_leaves_no_prefix_that_was_not_computed(tiny_model, monkeypatch, name):
    with LLM(tiny_model("qwen3"), device="cpu", **{**SMALL, "max_step_tokens": 256}) as llm:
        expected = llm.generate(list(range(100)), GREEDY)[0].token_ids
        llm.reset_prefix_cache()
        for cache in (llm.core.engine.kv.keys, llm.core.engine.kv.values):
            cache.zero_()
        scheduler = llm.core.scheduler
        run = getattr(scheduler, name)

        def interrupted(*args):
            run(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(scheduler, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(list(range(100)), GREEDY)
        monkeypatch.setattr(scheduler, name, run)
        [after] = llm.generate(list(range(100)), GREEDY)
        assert (after.token_ids, after.usage.cached_tokens) == (expected, 0)
        llm.reset_prefix_cache()
        assert scheduler.pool.num_free == scheduler.pool.num_pages


def test_a_step_that_fails_leaves_the_engine_usable(tiny_model, monkeypatch):
    with LLM(tiny_model("qwen3"), device="cpu", **SMALL) as llm:
        expected = llm.generate(list(range(40)), GREEDY)[0].token_ids
        llm.reset_prefix_cache()
        forward = llm.core.engine.model.forward
        monkeypatch.setattr(
            llm.core.engine.model, "forward", lambda *args: (_ for _ in ()).throw(RuntimeError("broken"))
        )
        with pytest.raises(RuntimeError, match="broken"):
            llm.generate(list(range(40)), GREEDY)
        monkeypatch.setattr(llm.core.engine.model, "forward", forward)
        [after] = llm.generate(list(range(40)), GREEDY)
        assert (after.token_ids, after.usage.cached_tokens) == (expected, 0)
        llm.reset_prefix_cache()
        assert llm.core.scheduler.pool.num_free == llm.core.scheduler.pool.num_pages
