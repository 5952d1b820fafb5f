"""The whole engine against transformers: greedy tokens of small random models, however the work is cut up."""

import contextlib
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisgl import LLM, MinisglError, SamplingParams
from minisgl import cascade as cascade_module
from minisgl.forward import StepResults
from minisgl.kernels import attention_decode
from tests.tiny_models import NAMES, VOCAB_SIZE, make

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SMALL = {"dtype": "float32", "page_size": 16, "max_running": 4, "max_step_tokens": 64}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Barely more pages than the longest request below needs: others are preempted, and resume.
TINY_POOL = {"num_pages": 12}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`folder(name)`: a tiny checkpoint, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def prompts_of_all_kinds(seed: int = 0) -> list[list[int]]:
    """One token, a few, prompts longer than a step, a group that shares a prefix, and two that are the same."""
    rng = random.Random(seed)

    def ids(count):
        return [rng.randrange(VOCAB_SIZE) for _ in range(count)]

    system = ids(48)
    twin = ids(32)
    return [ids(1), ids(7), ids(150), ids(100), system + ids(5), system + ids(20), system + ids(33), twin, list(twin)]


def transformers_tokens(folder, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(max_tokens):
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        out.append(ids[0, len(prompt) :].tolist())
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(folder, name, device):
    """Chunks, shared prefixes, cache hits and preemption change nothing."""
    prompts = prompts_of_all_kinds()
    expected = transformers_tokens(folder(name), prompts, GREEDY.max_tokens)
    with LLM(folder(name), device=device, **SMALL, **TINY_POOL) as llm:
        first = llm.generate(prompts, GREEDY)
        assert [result.token_ids for result in first] == expected
        assert llm.core.scheduler.num_preemptions > 0
        again = llm.generate(prompts, GREEDY)  # now some prefixes are cached
        assert [result.token_ids for result in again] == expected
        assert sum(result.usage.cached_tokens for result in first) > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, dtype, limit", [*((name, "bfloat16", 5e-2) for name in NAMES), ("qwen3", "float16", 5e-3)]
)
def test_narrow_logits_are_near_transformers(folder, monkeypatch, name, dtype, limit):
    """Relative error of the logits against transformers in fp32: three layers of roundings to 8 (11) bits. Of all
    prompts together: that of one is by chance up to twice as large."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32).eval()
    prompts = prompts_of_all_kinds()
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    seen, logits = [], []
    with LLM(folder(name), device="cuda", **{**SMALL, "dtype": dtype}, num_pages=40, max_graph_batch=0) as llm:
        forward = llm.core.engine.model.forward
        monkeypatch.setattr(llm.core.engine.model, "forward", lambda *args: seen.append(forward(*args)) or seen[-1])
        for prompt in prompts:
            llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
            logits.append(seen[-1][-1].float().cpu())
    assert (torch.stack(logits) - expected).norm() / expected.norm() < limit


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "llama-llama3"])
def test_the_triton_kernels_give_the_same_tokens(folder, name):
    prompts = [prompt[:70] for prompt in prompts_of_all_kinds()[:6]]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    expected = transformers_tokens(folder(name), prompts, 3)
    with LLM(folder(name), device="auto", **SMALL, num_pages=40) as llm:
        assert [result.token_ids for result in llm.generate(prompts, params)] == expected


@pytest.mark.interpreter
def test_the_kernels_of_deterministic_give_the_same_tokens(folder):
    prompts, params = [[3, 1, 4], list(range(20))], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    expected = transformers_tokens(folder("qwen3"), prompts, 2)
    with LLM(folder("qwen3"), device="auto", **SMALL, num_pages=40, deterministic=True) as llm:
        assert [result.token_ids for result in llm.generate(prompts, params)] == expected


@pytest.mark.parametrize(
    "options",
    [{"cache": "none"}, {"evict": "lfu"}, {"page_size": 128, "max_step_tokens": 256}, {"overlap": False}],
)
def test_options_do_not_change_the_tokens(folder, options):
    prompts = prompts_of_all_kinds()
    with LLM(folder("qwen3"), device="cpu", **SMALL, num_pages=64) as llm:
        expected = [result.token_ids for result in llm.generate(prompts, GREEDY)]
    with LLM(folder("qwen3"), device="cpu", **{**SMALL, "num_pages": 64, **options}) as llm:
        assert [result.token_ids for result in llm.generate(prompts, GREEDY)] == expected


@pytest.mark.parametrize("overlap", [True, False])
def test_nothing_follows_the_end_of_a_text(folder, overlap):
    """Under overlap a step for an ended request is in flight when its end is seen: what it samples is dropped."""
    prompts = prompts_of_all_kinds()
    with LLM(folder("qwen3"), device="cpu", overlap=overlap, **SMALL, **TINY_POOL) as llm:
        free = [result.token_ids for result in llm.generate(prompts, GREEDY)]
        ends = sorted({ids[len(ids) // 2] for ids in free})[:3]
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=ends)
        for ids, result in zip(free, llm.generate(prompts, params), strict=True):
            end = next((place + 1 for place, token in enumerate(ids) if token in ends), None)
            assert result.token_ids == ids[:end]
            assert result.finish_reason == ("stop" if end else "length")
        while llm.step():  # the last step in flight was for ended requests alone
            raise AssertionError("an ended request ended again")
        llm.reset_prefix_cache()
        assert llm.core.scheduler.pool.num_free == llm.core.scheduler.pool.num_pages


@pytest.mark.parametrize("device", DEVICES)
def test_an_abort_while_a_step_runs_frees_the_request_then(folder, device, monkeypatch):
    """In the middle of a prompt, and of an answer; the steps in flight go on, and others get what they get alone."""
    looks, asked = [], []
    is_ready = StepResults.ready.fget

    def ready(results):  # never at once
        asked.append(results)
        return asked.count(results) > 1 and is_ready(results)

    monkeypatch.setattr(StepResults, "ready", property(ready))
    prompts = prompts_of_all_kinds()
    with LLM(folder("qwen3"), device=device, **SMALL, num_pages=60) as llm:
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
def test_a_request_whose_logits_are_nan_fails_alone(folder, tmp_path, device, overlap):
    broken_id = 5
    shutil.copytree(folder("qwen3"), tmp_path / "model")
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


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"max_graph_batch": 0}, {"max_graph_batch": 2, "overlap": False}])
def test_graphs_and_overlap_do_not_change_the_tokens(folder, options):
    prompts = prompts_of_all_kinds() * 3
    params = [SamplingParams(temperature=i % 2, max_tokens=5 + i, top_k=i % 3) for i in range(len(prompts))]
    pool = {"page_size": 16, "max_running": 16, "max_step_tokens": 128, "num_pages": 40}
    with LLM(folder("qwen3"), device="cpu", dtype="float32", **pool) as llm:
        expected = [result.token_ids for result in llm.generate(prompts, params)]
    with LLM(folder("qwen3"), device="cuda", dtype="float32", **pool, **options) as llm:
        for _ in range(2):
            assert [result.token_ids for result in llm.generate(prompts, params)] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "llama", "mistral-window"])
def test_shared_prefixes_read_together_do_not_change_the_tokens(folder, name, tmp_path, monkeypatch):
    """Bit for bit: seeded sampling at temperature 1 would show any difference in the logits."""
    monkeypatch.setattr(cascade_module, "BREAK_EVEN_BYTES_PER_KEY", 0)
    model = tmp_path / name
    shutil.copytree(folder(name), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1000}))
    rng = random.Random(1)
    system = [rng.randrange(VOCAB_SIZE) for _ in range(600)]
    prompts = [system + [rng.randrange(VOCAB_SIZE) for _ in range(1 + i)] for i in range(40)] + [system[:300]] * 5
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    tokens = []
    for cascade in (True, False):
        with LLM(model, device="cuda", dtype="bfloat16", cascade=cascade, max_running=64, num_pages=1000) as llm:
            tokens.append([result.token_ids for result in llm.generate(prompts, params)])
            assert bool(llm.core.scheduler.cascade and llm.core.scheduler.cascade.num_plans) == cascade
    assert tokens[0] == tokens[1]


@pytest.mark.gpu
def test_nothing_compiles_after_the_first_job(folder, monkeypatch):
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(attention_decode, "MANY", 20)  # fewer sequences than run
    with LLM(folder("qwen3"), device="cuda", dtype="bfloat16", page_size=16, max_running=32, num_pages=400) as llm:
        assert attention_decode.many_sequences(llm.core.engine.model.shard.kv_heads.size) <= 32
        llm.generate(prompts_of_all_kinds(), GREEDY)
        knobs.runtime.jit_post_compile_hook = lambda **options: compiled.append(options["fn"].name)
        try:
            for seed in range(1, 4):
                llm.generate(prompts_of_all_kinds(seed)[seed:] * seed, SamplingParams(top_k=5, max_tokens=7 + seed))
            llm.generate([[1, 2, 3]] * 32, GREEDY)
        finally:
            knobs.runtime.jit_post_compile_hook = None
    assert not compiled


def test_a_seed_gives_the_same_text_whatever_runs_beside(folder):
    prompts = prompts_of_all_kinds()
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=8, ignore_eos=True, seed=5)
    with LLM(folder("qwen3"), device="cpu", **SMALL, **TINY_POOL) as llm:
        together = [result.token_ids for result in llm.generate(prompts, params)]
        alone = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]
        other = [result.token_ids for result in llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))]
    assert together == alone
    assert together != other


def test_equal_prompts_without_a_seed_differ_but_a_job_repeats_itself(folder):
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    with LLM(folder("qwen3"), device="cpu", **SMALL) as llm:
        first = [result.token_ids for result in llm.generate([[1, 2, 3]] * 4, params)]
        second = [result.token_ids for result in llm.generate([[1, 2, 3]] * 4, params)]
    assert first == second
    assert len({tuple(ids) for ids in first}) > 1


def test_two_engines_live_in_one_process(folder):
    with LLM(folder("qwen3"), device="cpu", **SMALL) as one, LLM(folder("llama"), device="cpu", **SMALL) as other:
        prompt = list(range(20))
        before = one.generate(prompt, GREEDY)[0].token_ids
        other.generate(prompt, GREEDY)
        assert one.generate(prompt, GREEDY)[0].token_ids == before


def test_text_in_and_out(folder):
    with LLM(folder("qwen3"), device="cpu", **SMALL) as llm:
        [one] = llm.generate("the inn", GREEDY)
        [same] = llm.generate([llm.tokenizer.encode("the inn")], GREEDY)
        assert one.token_ids == same.token_ids and one.text == llm.tokenizer.decode(one.token_ids)
        assert one.usage.prompt_tokens == len(llm.tokenizer.encode("the inn"))
        assert (one.finish_reason, one.usage.completion_tokens) == ("length", 20)
        conversation = [{"role": "user", "content": "the inn"}]
        [answer] = llm.chat(conversation, GREEDY)
        assert answer.usage.prompt_tokens == len(llm.tokenizer.apply_chat_template(conversation))
        assert [result.text for result in llm.chat([conversation, conversation], GREEDY)] == [answer.text] * 2


def test_stops(folder):
    """At EOS ids, at stop ids, at stop strings; the text ends before them."""
    with LLM(folder("qwen3"), device="cpu", **SMALL) as llm:
        [free] = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        third = free.token_ids[2]
        [by_id] = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[third]))
        end = free.token_ids.index(third) + 1
        assert (by_id.finish_reason, by_id.token_ids) == ("stop", free.token_ids[:end])
        assert by_id.text == llm.tokenizer.decode(free.token_ids[: end - 1])
        stop = free.text[2:4]
        [by_text] = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop))
        assert (by_text.finish_reason, by_text.text) == ("stop", free.text[: free.text.index(stop)])
        assert len(by_text.token_ids) < 12


def test_the_prefix_cache_is_used_and_reset(folder):
    with LLM(folder("qwen3"), device="cpu", **SMALL) as llm:
        prompt = list(range(50))
        cached = [llm.generate(prompt, GREEDY)[0].usage.cached_tokens for _ in range(2)]
        llm.reset_prefix_cache()
        cached.append(llm.generate(prompt, GREEDY)[0].usage.cached_tokens)
    assert cached == [0, 48, 0]


def test_bad_prompts_get_errors_and_the_others_answers(folder):
    with LLM(folder("qwen3"), device="cpu", max_len=64, **SMALL) as llm:
        prompts = [[1, 2], [], [VOCAB_SIZE + 7], [-1], [1] * 64, "\ud800", [3, 4]]
        results = llm.generate(prompts, GREEDY)
        assert [result.finish_reason for result in results] == ["length", *["error"] * 5, "length"]
        messages = [str(result.error) for result in results]
        assert "no tokens" in messages[1] and f"id {VOCAB_SIZE + 7} is outside" in messages[2]
        assert "id -1 is outside" in messages[3] and "64 tokens" in messages[4] and "Unicode" in messages[5]
        [result] = llm.chat([{"role": "robot", "content": "hi"}], GREEDY)
        assert "robot" in str(result.error)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"page_size": 48}, "power of two"),
        ({"max_runing": 3}, "max_running"),
        ({"max_step_tokens": 32}, "max_step_tokens"),
        ({"max_len": 10**9}, "context"),
        ({"device": "tpu"}, "cuda:N"),
        ({"device": "cuda:99"}, "GPU"),
        ({"num_pages": 1}, "no room"),
    ],
)
def test_options_that_cannot_be_are_refused(folder, options, words):
    with pytest.raises(MinisglError, match=words):
        LLM(folder("qwen3"), **{"device": "cpu", **options})


@pytest.mark.parametrize("prompt", [[1.5], [None], ["a"], [[1], [2, 3]], [True]])
def test_prompts_of_wrong_types_are_error_results(folder, prompt):
    with LLM(folder("qwen3"), device="cpu", **SMALL) as llm:
        [wrong, right] = llm.generate([prompt, [1, 2]], GREEDY)
    assert wrong.finish_reason == "error" and "must be a string or a list" in str(wrong.error)
    assert right.finish_reason == "length"


def test_arguments_of_wrong_types_are_refused(folder):
    with LLM(folder("qwen3"), device="cpu", **SMALL) as llm:
        with pytest.raises(MinisglError, match="prompts must be"):
            llm.generate(5)
        with pytest.raises(MinisglError, match="params must be SamplingParams"):
            llm.generate([[1, 2]], [None])
        for wrong in ("hi", None, {"role": "user", "content": "hi"}):
            with pytest.raises(MinisglError, match="generate takes strings"):
                llm.chat(wrong)
        with pytest.raises(MinisglError, match="tools is for conversations"):
            next(llm.stream([1, 2], tools=[]))
        with pytest.raises(MinisglError, match="params must be SamplingParams"):
            llm.generate([[1]], {"max_tokens": 3})


def test_a_closed_engine_says_so(folder):
    llm = LLM(folder("qwen3"), device="cpu", **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(MinisglError, match="closed"):
        llm.generate([1], GREEDY)


def test_a_step_too_large_for_the_memory_makes_steps_smaller(folder, monkeypatch, caplog):
    prompts = prompts_of_all_kinds()
    with LLM(folder("qwen3"), device="cpu", **{**SMALL, "max_step_tokens": 200}, num_pages=64) as llm:
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
        assert len(llm.generate(["Hi", "Ho"], SamplingParams(temperature=0, max_tokens=2))) == 2


def test_a_stop_string_that_shows_when_no_more_tokens_come():
    with LLM(device="cpu", **SMALL) as llm:
        half = next(token for token in range(1000) if llm.tokenizer.decode([token]) == "\ufffd")
        [result] = llm.generate(
            [[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={half: 100}, stop=["\ufffd"])
        )
        assert (result.text, result.finish_reason, result.token_ids) == ("", "stop", [half] * 3)


def test_a_step_that_fails_leaves_the_engine_usable(folder, monkeypatch):
    with LLM(folder("qwen3"), device="cpu", **SMALL) as llm:
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
