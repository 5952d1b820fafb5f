"""The whole engine against transformers: greedy tokens of small random models, however the work is cut up."""

import json
import random
import shutil

import numpy as np
import pytest
import torch

from minisgl import LLM, MinisglError, SamplingParams, graphs
from minisgl import cascade as cascade_module
from minisgl import engine as engine_module
from minisgl.kernels import attention_decode
from minisgl.kernels.launch import architecture
from tests.tiny_models import NAMES, VOCAB_SIZE, WIDE, prompts_of_all_kinds

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SMALL = {"dtype": "float32", "page_size": 16, "max_running": 4, "max_step_tokens": 64}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Barely more pages than the longest request below needs: others are preempted, and resume.
TINY_POOL = {"num_pages": 12}


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


def logprobs_in(model, ids: list[int]) -> torch.Tensor:
    """By transformers, of each token but the first."""
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_transformers(tiny_model, name, device):
    """Chunks, shared prefixes, cache hits and preemption change nothing."""
    prompts = prompts_of_all_kinds()
    expected = transformers_tokens(tiny_model(name), prompts, GREEDY.max_tokens)
    with LLM(tiny_model(name), device=device, **SMALL, **TINY_POOL) as llm:
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
def test_narrow_logits_are_near_transformers(tiny_model, monkeypatch, name, dtype, limit):
    """Relative error of the logits against transformers in fp32: three layers of roundings to 8 (11) bits. Of all
    prompts together: that of one is by chance up to twice as large."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.float32).eval()
    prompts = prompts_of_all_kinds()
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    seen, logits = [], []
    with LLM(tiny_model(name), device="cuda", **{**SMALL, "dtype": dtype}, num_pages=40, max_graph_batch=0) as llm:
        forward = llm.core.engine.model.forward
        monkeypatch.setattr(llm.core.engine.model, "forward", lambda *args: seen.append(forward(*args)) or seen[-1])
        for prompt in prompts:
            llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
            logits.append(seen[-1][-1].float().cpu())
    assert (torch.stack(logits) - expected).norm() / expected.norm() < limit


@pytest.mark.gpu
@pytest.mark.parametrize("name", WIDE)
def test_long_steps_of_wide_models_are_near_transformers(tiny_model, monkeypatch, name):
    """Those whose matmuls have a kernel of their own on Hopper, which is there when the first comes."""
    from transformers import AutoModelForCausalLM
    from triton import knobs

    if architecture(torch.device("cuda")) != "sm_90":
        pytest.skip("needs an sm_90 GPU")
    from minisgl.kernels import prefill_matmul_sm90 as kernels

    model = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.float32).eval()
    rng = random.Random(2)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(200 + 9 * index)] for index in range(6)]
    wanted = torch.cat([logprobs_in(model, prompt) for prompt in prompts])
    monkeypatch.setattr(kernels, "MIN_FILL", 0)
    with LLM(tiny_model(name), device="cuda", dtype="bfloat16", max_step_tokens=2048, num_pages=64) as llm:
        rows, compiled = [], []
        for launcher in ("gated_matmul", "heads_matmul"):
            run = getattr(kernels, launcher)
            monkeypatch.setattr(kernels, launcher, lambda x, *rest, run=run: rows.append(len(x)) or run(x, *rest))
        monkeypatch.setattr(
            knobs.runtime, "jit_post_compile_hook", lambda **options: compiled.append(options["fn"].name)
        )
        results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    assert not compiled
    assert rows == [sum(map(len, prompts))] * 2 * model.config.num_hidden_layers
    found = torch.tensor([one.logprob for result in results for one in result.prompt_logprobs])
    assert (found - wanted).norm() / wanted.norm() < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", WIDE)
def test_large_batches_of_decodes_of_wide_models_are_near_transformers(tiny_model, monkeypatch, name):
    """Whose q, k and v have a kernel of their own on Hopper."""
    from transformers import AutoModelForCausalLM

    if architecture(torch.device("cuda")) != "sm_90":
        pytest.skip("needs an sm_90 GPU")
    from minisgl.kernels import heads_matmul_sm90 as kernels

    rows, run = [], kernels.heads_matmul
    monkeypatch.setattr(kernels, "heads_matmul", lambda x, *rest: rows.append(len(x)) or run(x, *rest))
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(5 + index)] for index in range(60)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    with LLM(tiny_model(name), device="cuda", dtype="bfloat16", page_size=16, num_pages=600, max_running=64) as llm:
        results = llm.generate(prompts, params)
    assert {32, 64} <= set(rows)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.float32).eval()
    texts = [prompt + result.token_ids for prompt, result in zip(prompts, results, strict=True)]
    wanted = torch.cat([logprobs_in(model, ids)[-params.max_tokens :] for ids in texts])
    found = torch.tensor([one.logprob for result in results for one in result.logprobs])
    assert (found - wanted).norm() / wanted.norm() < 2e-2


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "llama-llama3"])
def test_the_triton_kernels_give_the_same_tokens(tiny_model, name):
    prompts = [prompt[:40] for prompt in prompts_of_all_kinds()[:6]]  # in more than one step, some on cached pages
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    expected = transformers_tokens(tiny_model(name), prompts, 3)
    with LLM(tiny_model(name), device="auto", **SMALL, num_pages=40) as llm:
        assert [result.token_ids for result in llm.generate(prompts, params)] == expected


@pytest.mark.interpreter
def test_the_kernels_of_deterministic_give_the_same_tokens(tiny_model):
    prompts, params = [[3, 1, 4], list(range(20))], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    expected = transformers_tokens(tiny_model("qwen3"), prompts, 2)
    with LLM(tiny_model("qwen3"), device="auto", **SMALL, num_pages=40, deterministic=True) as llm:
        assert [result.token_ids for result in llm.generate(prompts, params)] == expected


@pytest.mark.parametrize(
    "options",
    [{"cache": "none"}, {"evict": "lfu"}, {"page_size": 128, "max_step_tokens": 256}, {"overlap": False}],
)
def test_options_do_not_change_the_tokens(tiny_model, options):
    prompts = prompts_of_all_kinds()
    with LLM(tiny_model("qwen3"), device="cpu", **SMALL, num_pages=64) as llm:
        expected = [result.token_ids for result in llm.generate(prompts, GREEDY)]
    with LLM(tiny_model("qwen3"), device="cpu", **{**SMALL, "num_pages": 64, **options}) as llm:
        assert [result.token_ids for result in llm.generate(prompts, GREEDY)] == expected


@pytest.mark.parametrize("overlap", [True, False])
def test_nothing_follows_the_end_of_a_text(tiny_model, overlap):
    """Under overlap a step for an ended request is in flight when its end is seen: what it samples is dropped."""
    prompts = prompts_of_all_kinds()
    with LLM(tiny_model("qwen3"), device="cpu", overlap=overlap, **SMALL, **TINY_POOL) as llm:
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


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"max_graph_batch": 0}, {"max_graph_batch": 2, "overlap": False}])
def test_graphs_and_overlap_do_not_change_the_tokens(tiny_model, options):
    prompts = prompts_of_all_kinds() * 3
    params = [SamplingParams(temperature=i % 2, max_tokens=5 + i, top_k=i % 3) for i in range(len(prompts))]
    pool = {"page_size": 16, "max_running": 16, "max_step_tokens": 128, "num_pages": 40}
    with LLM(tiny_model("qwen3"), device="cpu", dtype="float32", **pool) as llm:
        expected = [result.token_ids for result in llm.generate(prompts, params)]
    with LLM(tiny_model("qwen3"), device="cuda", dtype="float32", **pool, **options) as llm:
        for _ in range(2):
            assert [result.token_ids for result in llm.generate(prompts, params)] == expected


def sharing_a_prefix(model, folder):
    """The model with a longer context, in a new folder, and prompts whose prefix is long enough to be read together."""
    longer = folder / model.name
    shutil.copytree(model, longer)
    config = json.loads((model / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1000}))
    rng = random.Random(1)
    system = [rng.randrange(VOCAB_SIZE) for _ in range(600)]
    prompts = [system + [rng.randrange(VOCAB_SIZE) for _ in range(1 + i)] for i in range(40)] + [system[:300]] * 5
    return longer, prompts


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2-window"])
def test_shared_prefixes_read_together_do_not_change_the_tokens(tiny_model, name, tmp_path, monkeypatch):
    """Bit for bit: seeded sampling at temperature 1 would show any difference in the logits."""
    monkeypatch.setattr(cascade_module, "BREAK_EVEN_BYTES_PER_KEY", 0)
    model, prompts = sharing_a_prefix(tiny_model(name), tmp_path)
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    tokens = []
    for cascade in (True, False):
        with LLM(model, device="cuda", dtype="bfloat16", cascade=cascade, max_running=64, num_pages=1000) as llm:
            tokens.append([result.token_ids for result in llm.generate(prompts, params)])
            assert bool(llm.core.scheduler.cascade and llm.core.scheduler.cascade.num_plans) == cascade
    assert tokens[0] == tokens[1]


@pytest.mark.interpreter
@pytest.mark.parametrize("name, max_running", [("qwen2", 2), ("qwen2-window", 9)])
def test_every_kind_of_step_runs_before_any_request(tiny_model, name, max_running):
    """However few may run at once: then there is no tile of a shared prefix."""
    options = {"max_running": max_running, "max_step_tokens": 256, "num_pages": 8}  # the interpreter has long with more
    with LLM(tiny_model(name), device="cpu", dtype="float32", **options) as llm:
        engine = llm.core.engine
        with engine._few_layers():
            engine._run_every_kind(engine.config, engine._new_cache(1, engine.config.page_size))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "qwen2-window"])
@pytest.mark.parametrize("max_graph_batch", [0, 512])
def test_nothing_compiles_after_the_start(tiny_model, tmp_path, monkeypatch, name, max_graph_batch):
    from triton import knobs

    compiled: list[str] = []
    for module in (attention_decode, engine_module, graphs):
        monkeypatch.setattr(module, "FEW_KEYS", 200)
    monkeypatch.setattr(cascade_module, "BREAK_EVEN_BYTES_PER_KEY", 0)
    model, shared = sharing_a_prefix(tiny_model(name), tmp_path)
    kv_heads = json.loads((model / "config.json").read_text())["num_key_value_heads"]
    # 50 sequences are above max_running, in its padding; contexts get longer than the few keys.
    monkeypatch.setattr(attention_decode, "MANY", 50 * kv_heads)
    monkeypatch.setattr(attention_decode, "MANY_OF_FEW_KEYS", 20 * kv_heads)
    options = {"page_size": 16, "max_running": 40, "num_pages": 2000, "max_graph_batch": max_graph_batch}
    with LLM(model, device="cuda", dtype="bfloat16", **options) as llm:
        knobs.runtime.jit_post_compile_hook = lambda **options: compiled.append(options["fn"].name)
        try:
            llm.generate(prompts_of_all_kinds(), GREEDY)
            for seed in range(1, 4):
                llm.generate(prompts_of_all_kinds(seed)[seed:] * seed, SamplingParams(top_k=5, max_tokens=7 + seed))
            for count in (12, 25, 40):
                llm.generate([[1, 2, 3]] * count, GREEDY)
            llm.generate(shared, GREEDY)
        finally:
            knobs.runtime.jit_post_compile_hook = None
        planner = llm.core.scheduler.cascade
        assert planner and planner.num_plans > 0
        if max_graph_batch:
            assert any(key.bound == 200 for key in llm.core.engine.graphs.keys)
    assert not compiled


def test_a_seed_gives_the_same_text_whatever_runs_beside(tiny_model):
    prompts = prompts_of_all_kinds()
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=8, ignore_eos=True, seed=5)
    with LLM(tiny_model("qwen3"), device="cpu", **SMALL, **TINY_POOL) as llm:
        together = [result.token_ids for result in llm.generate(prompts, params)]
        alone = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]
        other = [result.token_ids for result in llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))]
    assert together == alone
    assert together != other


def test_equal_prompts_without_a_seed_differ_but_a_job_repeats_itself(tiny_model):
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    with LLM(tiny_model("qwen3"), device="cpu", **SMALL) as llm:
        first = [result.token_ids for result in llm.generate([[1, 2, 3]] * 4, params)]
        second = [result.token_ids for result in llm.generate([[1, 2, 3]] * 4, params)]
    assert first == second
    assert len({tuple(ids) for ids in first}) > 1


def test_two_engines_live_in_one_process(tiny_model):
    with (
        LLM(tiny_model("qwen3"), device="cpu", **SMALL) as one,
        LLM(tiny_model("llama"), device="cpu", **SMALL) as other,
    ):
        prompt = list(range(20))
        before = one.generate(prompt, GREEDY)[0].token_ids
        other.generate(prompt, GREEDY)
        assert one.generate(prompt, GREEDY)[0].token_ids == before


def test_text_in_and_out(tiny_model):
    with LLM(tiny_model("qwen3"), device="cpu", **SMALL) as llm:
        [one] = llm.generate("the inn", GREEDY)
        [same] = llm.generate([llm.tokenizer.encode("the inn")], GREEDY)
        assert one.token_ids == same.token_ids and one.text == llm.tokenizer.decode(one.token_ids)
        assert one.usage.prompt_tokens == len(llm.tokenizer.encode("the inn"))
        assert (one.finish_reason, one.usage.completion_tokens) == ("length", 20)
        conversation = [{"role": "user", "content": "the inn"}]
        [answer] = llm.chat(conversation, GREEDY)
        assert answer.usage.prompt_tokens == len(llm.tokenizer.apply_chat_template(conversation))
        assert [result.text for result in llm.chat([conversation, conversation], GREEDY)] == [answer.text] * 2


def test_stops(tiny_model):
    """At EOS ids, at stop ids, at stop strings; the text ends before them."""
    with LLM(tiny_model("qwen3"), device="cpu", **SMALL) as llm:
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


def test_the_prefix_cache_is_used_and_reset(tiny_model):
    with LLM(tiny_model("qwen3"), device="cpu", **SMALL) as llm:
        prompt = list(range(50))
        cached = [llm.generate(prompt, GREEDY)[0].usage.cached_tokens for _ in range(2)]
        llm.reset_prefix_cache()
        cached.append(llm.generate(prompt, GREEDY)[0].usage.cached_tokens)
    assert cached == [0, 48, 0]


def test_bad_prompts_get_errors_and_the_others_answers(tiny_model):
    with LLM(tiny_model("qwen3"), device="cpu", max_len=64, **SMALL) as llm:
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
def test_options_that_cannot_be_are_refused(tiny_model, options, words):
    with pytest.raises(MinisglError, match=words):
        LLM(tiny_model("qwen3"), **{"device": "cpu", **options})


@pytest.mark.parametrize(
    "prompt",
    [[1.5], [None], ["a"], [[1], [2, 3]], [[1]], [True], [2**63], b"12345678", np.array([1.5]), np.array([[1]])],
    ids=repr,
)
def test_prompts_of_wrong_types_are_error_results(tiny_model, prompt):
    with LLM(tiny_model("qwen3"), device="cpu", **SMALL) as llm:
        [wrong, right] = llm.generate([prompt, [1, 2]], GREEDY)
    assert wrong.finish_reason == "error" and "must be a string or a list" in str(wrong.error)
    assert right.finish_reason == "length"


def test_arguments_of_wrong_types_are_refused(tiny_model):
    with LLM(tiny_model("qwen3"), device="cpu", **SMALL) as llm:
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


def test_a_closed_engine_says_so(tiny_model):
    llm = LLM(tiny_model("qwen3"), device="cpu", **SMALL)
    llm.close()
    llm.close()
    with pytest.raises(MinisglError, match="closed"):
        llm.generate([1], GREEDY)


def test_a_stop_string_that_shows_when_no_more_tokens_come():
    with LLM(device="cpu", **SMALL) as llm:
        half = next(token for token in range(1000) if llm.tokenizer.decode([token]) == "\ufffd")
        [result] = llm.generate(
            [[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={half: 100}, stop=["\ufffd"])
        )
        assert (result.text, result.finish_reason, result.token_ids) == ("", "stop", [half] * 3)
