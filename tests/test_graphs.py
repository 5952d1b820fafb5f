"""Captured steps, with a stand-in for CUDA graphs: it runs the forward pass again, into the same tensors."""

from dataclasses import replace

import pytest
import torch

from minisgl import LLM, SamplingParams, engine, graphs
from minisgl.engine import Engine
from minisgl.forward import NOTHING_MORE, Forward
from minisgl.graphs import Captured, Key, StepGraphs
from tests.tiny_models import make

SMALL = {"device": "cpu", "dtype": "float32", "page_size": 16, "max_running": 4, "max_step_tokens": 64}


def tensors(made: Forward) -> list[torch.Tensor]:
    """What a step made, and where."""
    found = [
        made.rows,
        made.positions,
        made.logits,
        made.ids,
        made.pooled,
        *(made.logprobs or ()),
        *(made.scored or ()),
    ]
    return [x for x in found if x is not None]


class Replayed(StepGraphs):
    """Graphs that a CPU can replay. What a step reads must be in the tables and inputs, as on a GPU."""

    def _capture(self, key: Key) -> bool:
        inputs = self._new_inputs(key)
        made = self._forward(self._batch(key, inputs), key)
        self._forget_inputs()
        static = tensors(made)

        class Graph:
            def replay(graph) -> None:
                again = self._forward(self._batch(key, inputs), key)
                for kept, new in zip(static, tensors(again), strict=True):
                    kept.copy_(new)

        self._graphs[key] = Captured(Graph(), made, inputs)
        return True


def use_graphs(monkeypatch, kind, max_batch=512, short_sizes=()):
    """Let engines on a CPU make graphs too."""

    def new_graphs(made):
        return kind(made.rows, made.run_key, max_batch, made.group, made._batch_sizes, short_sizes)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Engine, "_new_graphs", new_graphs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("qwen3"))


def without_logprobs(results):
    return [replace(result, logprobs=None) for result in results]


def assert_logprobs_close(got, expected):
    """Other numbers of rows round matmuls otherwise."""
    for one, other in zip(got, expected, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [value for _, value in a.top] == pytest.approx([value for _, value in b.top], abs=1e-4)


def test_captured_steps_give_the_same_answers(folder, monkeypatch):
    """Batches that need padding, requests that ask for more than a token and others that do not, and grammars; prompts
    that come in chunks, beside decodes and without, and prefixes that are found."""
    formats = pytest.importorskip("minisgl.structured")
    pytest.importorskip("llguidance")
    plain = {"temperature": 1.0, "seed": 3, "max_tokens": 24, "ignore_eos": True}
    asked = [
        SamplingParams(**plain),
        SamplingParams(**plain, repetition_penalty=1.4, logprobs=3),
        SamplingParams(**plain),
        SamplingParams(**{**plain, "ignore_eos": False}, response_format=formats.ResponseFormat(regex="[ab]{30}")),
        SamplingParams(**plain, logit_bias={4: 5.0}),
        SamplingParams(**plain, logprobs=0),
        SamplingParams(**plain, prompt_logprobs=1),
        SamplingParams(**{**plain, "max_tokens": 3}),
    ]
    lengths = [30, 30, 97, 30, 30, 130, 30, 90]
    prompts = [[place, *range(start, start + size)] for place, (start, size) in enumerate(enumerate(lengths))]
    prompts.append(prompts[5][:100])
    asked.append(SamplingParams(**plain))
    with LLM(folder, **SMALL) as llm:
        expected = llm.generate(prompts, asked)
    use_graphs(monkeypatch, Replayed)
    monkeypatch.setattr(graphs, "TOKENS", (40, 72))
    with LLM(folder, **SMALL) as llm:
        got = llm.generate(prompts, asked)
        keys = llm.core.engine.graphs.keys
        masked = [captured for key, captured in llm.core.engine.graphs._graphs.items() if key.masked]
        assert len(masked) > 1 and len({captured.made.logits.data_ptr() for captured in masked}) == 1  # memory of one
    assert without_logprobs(got) == without_logprobs(expected)
    assert_logprobs_close(got, expected)
    assert any(result.usage.cached_tokens for result in got)
    for kind in ([key for key in keys if key.tokens], [key for key in keys if not key.tokens]):
        assert {key.masked for key in kind} == {True, False} and {key.wanted.edits for key in kind} == {True, False}
        assert len({key.wanted.num_top for key in kind}) > 1
    assert {key.tokens for key in keys} == {0, 40, 72} and len({key.size for key in keys if not key.tokens}) > 1


def test_steps_that_no_graph_holds_run_eagerly(folder, monkeypatch):
    """Too many tokens, too many chunks, prompt tokens that are scored, too many decodes."""
    use_graphs(monkeypatch, Replayed, max_batch=2)
    monkeypatch.setattr(graphs, "CHUNKS", 2)
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)

    def keys_of(prompts, params=params):
        with LLM(folder, **{**SMALL, "max_step_tokens": 512}) as llm:
            llm.core.engine.graphs.max_tokens = 128
            assert all(result.error is None for result in llm.generate(prompts, params))
            return [(key.size, key.tokens) for key in llm.core.engine.graphs.keys]

    short = [[place, *range(9)] for place in range(4)]
    assert keys_of(short[:2]) == [(4, 32), (2, 0)]
    assert keys_of(short[:3]) == keys_of(short) == []
    assert keys_of([list(range(129))]) == [(1, 0)]
    assert keys_of(short[:1], replace(params, prompt_logprobs=0)) == [(1, 0)]


def test_short_contexts_have_graphs_of_their_own_where_attention_has_a_kernel_for_them(folder, monkeypatch):
    use_graphs(monkeypatch, Replayed, short_sizes=range(2, 4))
    monkeypatch.setattr(graphs, "FEW_KEYS", 40)
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.0)  # 30 tokens become 54
    prompts = [list(range(start, start + 30)) for start in range(3)]
    with LLM(folder, **{**SMALL, "max_step_tokens": 128}) as llm:
        for count in (1, 2, 3):
            llm.generate(prompts[:count], params)
        keys = llm.core.engine.graphs.keys
    assert sorted((key.size, key.bound) for key in keys if not key.tokens) == [(1, 256), (2, 40), (2, 256), (4, 256)]


@pytest.mark.parametrize("dtype, size", [("float32", 12), ("bfloat16", 32)])
def test_few_rows_are_padded_further_where_hoppers_matmuls_take_over(folder, monkeypatch, dtype, size):
    use_graphs(monkeypatch, Replayed)
    monkeypatch.setattr(engine, "hopper_module", lambda name, device: engine)
    with LLM(folder, **{**SMALL, "dtype": dtype, "max_running": 10}) as llm:
        llm.generate([[place, 1, 2] for place in range(10)], SamplingParams(max_tokens=4, ignore_eos=True))
        assert [key.size for key in llm.core.engine.graphs.keys if not key.tokens] == [size]


def test_without_memory_for_a_capture_steps_run_eagerly(folder, monkeypatch, caplog):
    """One line for each size that is tried, no wrong token, and none is tried again."""
    prompts = [list(range(start, start + 30)) for start in range(6)]
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
    with LLM(folder, **SMALL) as llm:
        expected = llm.generate(prompts, params)

    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("there")

    use_graphs(monkeypatch, StepGraphs)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", no_memory)
    with LLM(folder, **SMALL, cache="none") as llm:
        for _ in range(3):  # a step with chunks is captured when it comes again
            assert llm.generate(prompts, params) == expected
        left = llm.core.engine.graphs
        assert left.keys == [] and left.max_batch == 1 and left.max_tokens == 32
    lines = [record.getMessage() for record in caplog.records if "no memory to capture" in record.getMessage()]
    sizes = ("steps of 64 tokens", "decode steps of 4 rows", "decode steps of 2 rows")
    assert lines == [f"no memory to capture {size}: they run eagerly, slower" for size in sizes]


@pytest.mark.parametrize("tokens", [0, 64])
def test_what_is_captured_leaves_the_inputs_as_they_are(folder, monkeypatch, tokens):
    """Else a replay would read other tiles of a shared prefix than it was given."""
    use_graphs(monkeypatch, StepGraphs)
    with LLM(folder, **SMALL) as llm:
        made = llm.core.engine.graphs
        key = Key(size=4, bound=64, tile_members=2, wanted=NOTHING_MORE, masked=False, tokens=tokens)
        inputs = made._new_inputs(key)
        made._cascade_in.fill_(7)
        before = inputs.clone()
        batch = made._batch(key, inputs)
    assert torch.equal(inputs, before) and (made._cascade_in == 7).all()
    assert (batch.cascade.shared_splits == 7).all() and batch.decodes_only == (not tokens)


@pytest.mark.gpu
def test_captured_steps_on_a_gpu(folder):
    """The second time that a step of a size comes, it is captured; answers stay as they are without graphs."""
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.0)
    texts = [[(place * 7 + 3 * i) % 200 for i in range(20 + 9 * place)] for place in range(24)]
    options = {"device": "cuda", "dtype": "float32", "max_running": 6, "num_pages": 64, "cache": "none"}
    options["max_step_tokens"] = 256
    with LLM(folder, **options, max_graph_batch=0) as llm:
        expected = [result.token_ids for result in llm.generate(texts, params)]
    with LLM(folder, **options) as llm:
        for _ in range(2):
            assert [result.token_ids for result in llm.generate(texts, params)] == expected
        keys = llm.core.engine.graphs.keys
    assert len({key.tokens for key in keys}) > 2 and {key.bound for key in keys if key.tokens}


@pytest.mark.parametrize("failing", [1, 2, 11])
def test_a_transfer_that_fails_leaves_no_stale_inputs(folder, monkeypatch, failing):
    """The device runs out of memory before the inputs of a graph are there; the same rows decode again afterwards."""
    prompts = [list(range(start, start + 20)) for start in range(6)]
    asked = [SamplingParams(temperature=1.0, seed=seed, max_tokens=6 + 2 * seed, ignore_eos=True) for seed in range(6)]
    with LLM(folder, **SMALL) as llm:
        expected = llm.generate(prompts, asked)
    use_graphs(monkeypatch, Replayed)
    transfers = 0

    def transfer(*args):
        nonlocal transfers
        transfers += 1
        if transfers == failing:
            raise torch.OutOfMemoryError("there")
        update(*args)

    with LLM(folder, **{**SMALL, "max_step_tokens": 512}) as llm:
        update = llm.core.engine.rows.update
        llm.core.engine.rows.update = transfer
        assert llm.generate(prompts, asked) == expected
    assert transfers > failing
