"""Captured decode steps, with a stand-in for CUDA graphs: it runs the forward pass again, into the same tensors."""

import pytest
import torch

from minisgl import LLM, SamplingParams
from minisgl.engine import Engine
from minisgl.graphs import DecodeGraphs, Key
from tests.tiny_models import make

SMALL = {"device": "cpu", "dtype": "float32", "page_size": 16, "max_running": 4, "max_step_tokens": 64}


class Replayed(DecodeGraphs):
    """Graphs that a CPU can replay. What a step reads must be in the tables and inputs, as on a GPU."""

    def _capture(self, key: Key) -> bool:
        inputs = self._rows_in[: key.size]
        made = self._forward(self.rows.decode_batch(inputs.fill_(-1), key.bound), key)
        self._forget_inputs()
        static = made.tensors()

        class Graph:
            def replay(graph) -> None:
                again = self._forward(self.rows.decode_batch(inputs, key.bound), key)
                for kept, new in zip(static, again.tensors(), strict=True):
                    kept.copy_(new)

        self._graphs[key] = Graph(), made
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make("qwen3", tmp_path_factory.mktemp("qwen3"))


def test_captured_steps_give_the_same_answers(folder, monkeypatch):
    """Batches that need padding, requests that ask for more than a token and others that do not, and grammars."""
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
    ]
    prompts = [list(range(start, start + 30)) for start in range(len(asked))]
    with LLM(folder, **SMALL) as llm:
        expected = llm.generate(prompts, asked)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Engine, "_new_graphs", lambda engine: Replayed(engine.rows, engine.run_key, 512, engine.group))
    with LLM(folder, **SMALL) as llm:
        assert llm.generate(prompts, asked) == expected
        keys = llm.core.engine.graphs.keys
    assert {key.masked for key in keys} == {True, False} and {key.wanted.edits for key in keys} == {True, False}
    assert len({key.size for key in keys}) > 1 and len({key.wanted.num_top for key in keys}) > 1


@pytest.mark.parametrize("failing", [1, 2, 11])
def test_a_transfer_that_fails_leaves_no_stale_inputs(folder, monkeypatch, failing):
    """The device runs out of memory before the inputs of a graph are there; the same rows decode again afterwards."""
    prompts = [list(range(start, start + 20)) for start in range(6)]
    asked = [SamplingParams(temperature=1.0, seed=seed, max_tokens=6 + 2 * seed, ignore_eos=True) for seed in range(6)]
    with LLM(folder, **SMALL) as llm:
        expected = llm.generate(prompts, asked)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Engine, "_new_graphs", lambda engine: Replayed(engine.rows, engine.run_key, 512, engine.group))
    transfers = 0

    def transfer(*args):
        nonlocal transfers
        transfers += 1
        if transfers == failing:
            raise torch.OutOfMemoryError("there")
        load_decode(*args)

    with LLM(folder, **{**SMALL, "max_step_tokens": 512}) as llm:
        load_decode = llm.core.engine.rows.load_decode
        llm.core.engine.rows.load_decode = transfer
        assert llm.generate(prompts, asked) == expected
    assert transfers > failing
