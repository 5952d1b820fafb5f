"""Logits equal those of transformers, whichever way a text is cut into prefill chunks and decode steps."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisgl.batch import Batch, KVCache
from minisgl.kernels.attention_prefill import prefill_tiles, query_block
from minisgl.kernels.rms_norm import rms_norm
from minisgl.layers import rms_norm as norms
from minisgl.layers.ops import FASTEST
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.weights import load_weights
from tests.tiny_models import NAMES, VOCAB_SIZE

PAGE_SIZE, PAGES_PER_ROW, ROWS = 16, 8, 3
CPU = torch.device("cpu")


class PagedModel:
    """A decoder with a small KV cache, whose rows have scattered pages and whose unused slots are NaN."""

    def __init__(self, folder, group=None, load_format="auto", ops=FASTEST):
        config, max_len = ModelConfig.from_folder(folder), PAGE_SIZE * PAGES_PER_ROW
        self.decoder = Decoder(config, device=CPU, dtype=torch.float32, max_len=max_len, group=group, ops=ops)
        load_weights(self.decoder, folder, load_format)
        kv_heads = self.decoder.shard.kv_heads.size
        shape = (config.num_layers, ROWS * PAGES_PER_ROW, PAGE_SIZE, kv_heads, config.head_dim)
        self.kv = KVCache(torch.full(shape, torch.nan), torch.full(shape, torch.nan))
        pages = torch.randperm(ROWS * PAGES_PER_ROW, generator=torch.Generator().manual_seed(0))
        self.page_table = pages.view(ROWS, PAGES_PER_ROW).int()
        self.length = [0] * ROWS

    def step(self, decode=(), prefill=(), sample_chunks=True):
        """One forward pass. decode, prefill: (row, new ids) each; decoding rows have one new id."""
        parts = [*decode, *prefill]
        positions = [torch.arange(self.length[row], self.length[row] + len(ids)) for row, ids in parts]
        slots = [
            self.page_table[row, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            for (row, _), at in zip(parts, positions, strict=True)
        ]
        for row, ids in parts:
            self.length[row] += len(ids)
        rows = [row for row, _ in parts]
        kv_lens = [self.length[row] for row in rows]
        new = [len(ids) for _, ids in prefill]
        ends = torch.tensor([0, *new]).cumsum(0) + len(decode)
        config = self.decoder.config
        tiles = prefill_tiles(new, kv_lens[len(decode) :], query_block(config.head_dim, CPU, torch.float32))
        sampled = [*range(len(decode)), *((ends[1:] - 1).tolist() if sample_chunks else [])]
        batch = Batch(
            input_ids=torch.tensor([i for _, ids in parts for i in ids], dtype=torch.int32),
            positions=torch.cat(positions).int(),
            slots=torch.cat(slots).int(),
            rows=torch.tensor(rows, dtype=torch.int32),
            kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
            num_decode=len(decode),
            max_decode_len=max(kv_lens[: len(decode)], default=0),
            cu_seqlens=ends.int(),
            tiles=torch.from_numpy(tiles),
            sample_index=torch.tensor(sampled, dtype=torch.int32),
            sample_rows=torch.empty(0),  # for the sampler
            sample_positions=torch.empty(0),
            page_table=self.page_table,
        )
        return self.decoder.forward(batch, self.kv)  # [N, V]


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (size,), generator=generator).tolist() for size in (61, 37, 17)]


@pytest.fixture(scope="module", params=NAMES)
def case(request, tiny_model, texts):
    """(folder, transformers' logits of each text  # [size, V])."""
    folder = tiny_model(request.param)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return folder, [hf(torch.tensor([ids])).logits[0] for ids in texts]


def assert_equal_logits(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_whole_prompt(case, texts):
    folder, expected = case
    model = PagedModel(folder)
    assert_equal_logits(model.step(prefill=[(1, texts[0])]), expected[0][-1:])


def test_chunks_and_decode_steps_in_one_batch(case, texts):
    """Three texts: one runs in chunks, while the others prefill and then decode token by token."""
    folder, expected = case
    model = PagedModel(folder)
    long, middle, short = texts
    first = model.step(prefill=[(2, long[:19]), (0, middle[:33])])
    assert_equal_logits(first, torch.stack([expected[0][18], expected[1][32]]))

    mixed = model.step(decode=[(0, middle[33:34])], prefill=[(1, short[:16]), (2, long[19:60])])
    assert_equal_logits(mixed, torch.stack([expected[1][33], expected[2][15], expected[0][59]]))

    for at in range(3):
        decoding = [(0, middle[34 + at : 35 + at])] + ([(2, long[60:]), (1, short[16:])] if at == 0 else [])
        rows = [expected[1][34 + at]] + ([expected[0][60], expected[2][16]] if at == 0 else [])
        assert_equal_logits(model.step(decode=decoding), torch.stack(rows))


def test_a_chunk_that_is_not_sampled(case, texts):
    folder, expected = case
    model = PagedModel(folder)
    assert model.step(prefill=[(0, texts[0][:30])], sample_chunks=False).shape == (0, VOCAB_SIZE)
    assert_equal_logits(model.step(prefill=[(0, texts[0][30:])]), expected[0][-1:])


def test_matmuls_in_parts(case, texts):
    """As Hopper's kernel leaves those whose inputs are split; the norm behind each adds them up."""
    folder, expected = case
    numbers = []

    def in_parts(residual, x, weight, bias):
        first = x.shape[1] // 3
        parts = FASTEST.linear(x[:, :first], weight[:, :first], bias), x[:, first:] @ weight[:, first:].t()
        numbers.append(len(parts))
        return torch.stack(parts)

    model = PagedModel(folder, ops=FASTEST._replace(add_linear=in_parts))
    model.step(prefill=[(1, texts[0][:33])], sample_chunks=False)
    assert_equal_logits(
        model.step(decode=[(1, texts[0][33:34])], prefill=[(0, texts[1])]),
        torch.stack([expected[0][33], expected[1][-1]]),
    )
    assert len(numbers) == 4 * len(model.decoder.layers)


def test_an_excerpt_has_a_layer_of_each_window_and_the_last(tiny_model):
    config = replace(ModelConfig.from_folder(tiny_model("qwen3")), num_layers=6, windows=(0, 0, 8, 8, 0, 0))
    whole = Decoder(config, device=CPU, dtype=torch.float32, max_len=16)
    short = whole.excerpt()
    assert short.layers == [whole.layers[0], whole.layers[2], whole.layers[5]]
    assert short.norms_after == [whole.layers[1].attention_norm, whole.layers[3].attention_norm, whole.norm]
    assert len(whole.layers) == 6 and short.lm_head is whole.lm_head


def test_norms_of_parts_run_before_they_are_needed(tiny_model, monkeypatch):
    """In `run_matmuls`, which has their kernels compiled."""
    shapes = []

    def note(x, weight, eps, residual=None):
        shapes.append(tuple(x.shape))
        return rms_norm(x, weight, eps, residual)

    monkeypatch.setattr(norms, "rms_norm", note)
    ops = FASTEST._replace(add_linear=lambda residual, x, weight, bias: torch.stack([x @ weight.t()] * 3))
    model = PagedModel(tiny_model("qwen3"), ops=ops)
    model.decoder.run_matmuls(7, model.kv)
    assert shapes == [(3, 7, model.decoder.config.hidden_size)] * 2
    assert model.kv.keys.isnan().all() and model.kv.values.isnan().all()
