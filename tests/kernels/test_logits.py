"""Edited logits against the reference, and the reference against transformers' processors and the OpenAI formulas."""

import dataclasses

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from minisgl.kernels.logits import Edits, edit_logits, edit_logits_reference

HAS_GPU = torch.cuda.is_available()
INF = float("inf")


def pack(allowed):
    """Masks  # [M, W] int32 of allowed  # [M, V] bool."""
    bits = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32)).unflatten(1, (-1, 32)).long()
    words = (bits << torch.arange(32, device=bits.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def case(samples, vocab, device, max_len=2500, biases=5):
    """Arguments of `edit_logits` in which each row asks for something else, at random."""
    generator = torch.Generator().manual_seed(vocab)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    def some(values, off):
        return torch.where(uniform(*values.shape) < 0.5, values, off).to(device)

    num_rows = samples + 3
    prompts = (uniform(num_rows) * max_len * 0.7).int()
    positions = torch.minimum(prompts[:samples] + (uniform(samples) * 600).int(), torch.tensor(max_len))
    rows = torch.randperm(num_rows, generator=generator)[:samples].int()
    ids = torch.stack([torch.randperm(max(vocab, biases), generator=generator)[:biases] for _ in range(num_rows)]).int()
    bans = (uniform(num_rows, 9, 3) ** 3 * min(vocab, 20)).int()
    edits = Edits(
        prompt_length=prompts.to(device),
        repetition=some(0.5 + uniform(num_rows), torch.tensor(1.0)),
        presence=some(uniform(num_rows) * 4 - 2, torch.tensor(0.0)),
        frequency=some(uniform(num_rows) - 0.5, torch.tensor(0.0)),
        bias_ids=some(ids.where(ids < vocab, -1), torch.tensor(-1, dtype=torch.int32)),
        biases=some(uniform(num_rows, biases) * 20 - 10, torch.tensor(-INF)),
        bias_from=some((uniform(num_rows, biases) * max_len).int(), torch.tensor(0, dtype=torch.int32)),
        bans=bans.where(torch.arange(3) >= (uniform(num_rows, 9, 1) * 4).int(), -1).to(device),
    )
    masks = pack(uniform(3, vocab) < 0.5).to(device)
    mask_of = torch.randint(-1, 3, (samples,), generator=generator).int()
    skewed = (uniform(num_rows, max_len) ** 3 * vocab).int()  # few tokens come often, most never
    return {
        "rows": rows.to(device),
        "positions": positions.to(device),
        "tokens": skewed.to(device),
        "max_position": max_len,
        "edits": edits,
        "counts": torch.zeros(samples + 1, vocab, dtype=torch.int32, device=device),
        "masks": masks,
        "mask_of": mask_of.to(device),
    }


def reference(logits, arguments):
    names = ("rows", "positions", "tokens", "edits", "masks", "mask_of")
    return edit_logits_reference(logits.clone(), *(arguments[name] for name in names))


@pytest.mark.parametrize("vocab", [1, 31, 33, 1000, 5003])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_equals_the_reference(device, dtype, vocab, masked):
    samples = 60 if HAS_GPU else 6
    arguments = case(samples, vocab, device)
    if not masked:
        arguments["masks"] = arguments["mask_of"] = None
    padded = torch.full((samples, vocab + 5), torch.nan, device=device, dtype=dtype)
    logits = padded[:, :vocab]
    logits.copy_(torch.randn(samples, vocab, device=device) * 3)
    before = logits.clone()
    expected = reference(logits, arguments)
    for _ in range(2):  # the counts are zeros again
        out = edit_logits(logits.copy_(before), **arguments)
        assert out is logits
        # Where a product is fused with an addition, one rounding is saved.
        torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-6)
        assert not arguments["counts"].any()
    assert padded[:, vocab:].isnan().all()


@pytest.mark.parametrize("size", [64, 448, 1024])
def test_slices_of_ranks_are_edited_as_the_whole(device, size):
    """The last slice has padding, or is all padding, as where there are more ranks than ids for them."""
    vocab, samples = 1000, 6
    arguments = case(samples, vocab, device)
    logits = torch.randn(samples, vocab, device=device) * 3
    expected = edit_logits(logits.clone(), **arguments)
    found = []
    for first_id in range(0, vocab + size, size):
        num_ids = max(0, min(size, vocab - first_id))
        part = torch.full((samples, size), 7.0, device=device)
        part[:, :num_ids] = logits[:, first_id : first_id + num_ids]
        counts = torch.zeros(samples, size, dtype=torch.int32, device=device)
        out = edit_logits(part, **arguments | {"counts": counts}, first_id=first_id, num_ids=num_ids)
        assert out is part and not counts.any() and (out[:, num_ids:] == 7).all()
        found.append(out[:, :num_ids])
    assert torch.equal(torch.cat(found, 1), expected)


def test_rows_that_ask_for_nothing_and_padding_stay(device):
    arguments = case(4, 700, device)
    arguments["edits"] = Edits.none(7, 5, device)
    arguments["mask_of"].fill_(-1)
    arguments["rows"][2] = -1
    arguments["mask_of"][2] = 0
    logits = torch.randn(4, 700, device=device)
    assert torch.equal(edit_logits(logits.clone(), **arguments), logits)
    assert torch.equal(reference(logits, arguments), logits)


def test_an_edit_does_not_depend_on_the_batch(device):
    arguments = case(5, 1000, device)
    logits = torch.randn(5, 1000, device=device)
    together = edit_logits(logits.clone(), **arguments)
    for place in range(5):
        one = {name: arguments[name][place : place + 1] for name in ("rows", "positions", "mask_of")}
        assert torch.equal(edit_logits(logits[place : place + 1].clone(), **arguments | one)[0], together[place])


def one_row(device, text, prompt_length, logits, **edits):
    """Both functions' logits of one row that asks for `edits`."""
    tables = Edits.none(1, 2, device, max_bans=2, max_ban_tokens=3)
    tables.prompt_length.fill_(prompt_length)
    for name, value in edits.items():
        getattr(tables, name)[0] = torch.as_tensor(value, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    tokens = torch.tensor([text], dtype=torch.int32, device=device)
    position, counts = zero + len(text), torch.zeros(1, logits.shape[1], dtype=torch.int32, device=device)
    return (
        edit_logits(logits.clone(), zero, position, tokens, len(text), tables, counts),
        edit_logits_reference(logits.clone(), zero, position, tokens, tables),
    )


def test_repetition_is_that_of_transformers(device):
    torch.manual_seed(0)
    logits, text = torch.randn(1, 50, device=device), [3, 3, 7, 49, 0, 7, 7]
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor([text], device=device), logits.clone())
    for out in one_row(device, text, 4, logits, repetition=1.3):
        torch.testing.assert_close(out, expected)


def test_presence_and_frequency_count_the_output_alone(device):
    logits = torch.zeros(1, 10, device=device)
    for out in one_row(device, [1, 2, 2, 3, 3, 3, 2], 3, logits, presence=0.5, frequency=0.25):
        assert out.tolist() == [[0, 0, -0.75, -1.25, 0, 0, 0, 0, 0, 0]]


def test_penalties_come_after_biases(device):
    """A bias changes the sign that repetition looks at, and a ban stays one."""
    logits = torch.tensor([[1.0, -1.0, 1.0]], device=device)
    for out in one_row(device, [0, 1, 2], 3, logits, repetition=2.0, bias_ids=[0, 2], biases=[-3.0, -INF]):
        assert out.tolist() == [[-4.0, -2.0, -INF]]


def test_a_stop_id_is_banned_until_min_tokens(device):
    """Prompt of 2, min_tokens 2: the third token of the output, at position 4, may be the stop id."""
    logits = torch.zeros(1, 5, device=device)
    for output, expected in ((0, -INF), (1, -INF), (2, 1.5)):
        edits = {"bias_ids": [4, -1], "biases": [1.5, 0.0], "bias_from": [4, 0]}
        for out in one_row(device, [0] * (2 + output), 2, logits, **edits):
            assert out.tolist() == [[0, 0, 0, 0, expected]]


@pytest.mark.parametrize("output, banned", [([], []), ([5], [8]), ([4, 5], [7, 8]), ([5, 4], []), ([4, 5, 5], [8])])
def test_a_bad_word_is_banned_where_the_output_has_its_beginning(device, output, banned):
    """Bad words (5 8) and (4 5 7); the prompt ends with 4 5, which is no output. A ban wins over a bias of 8."""
    edits = {"bans": [[-1, 5, 8], [4, 5, 7]], "bias_ids": [8, 9], "biases": [3.0, 2.0]}
    expected = [0, 0, 0, 0, 0, 0, 0, 0, 3, 2]
    for token in banned:
        expected[token] = -INF
    for out in one_row(device, [4, 5, *output], 2, torch.zeros(1, 10, device=device), **edits):
        assert out.tolist() == [expected]


def test_a_bad_word_of_one_token_is_always_banned(device):
    for out in one_row(device, [1], 1, torch.zeros(1, 3, device=device), bans=[[-1, -1, 2], [-1, -1, -1]]):
        assert out.tolist() == [[0, 0, -INF]]


def test_ids_beyond_the_mask_are_banned(device):
    """A grammar packs the tokenizer's ids; a padded vocabulary has more, in the last word."""
    arguments = case(1, 40, device)
    arguments["edits"] = Edits.none(4, 5, device)
    arguments["masks"] = pack(torch.arange(35)[None] % 2 == 0).to(device)
    arguments["mask_of"].fill_(0)
    out = edit_logits(torch.zeros(1, 40, device=device), **arguments)[0]
    assert out.isfinite().nonzero().flatten().tolist() == list(range(0, 35, 2))


@pytest.mark.parametrize(
    "name, change",
    [
        ("logits", lambda x: x.double()),
        ("logits", lambda x: x[0]),
        ("rows", lambda x: x.long()),
        ("positions", lambda x: x[:-1]),
        ("tokens", lambda x: x[:, :-1]),
        ("tokens", lambda x: x.t().contiguous().t()),
        ("counts", lambda x: x[:, :-1]),
        ("counts", lambda x: x[:2]),
        ("masks", lambda x: x[:, :-1]),
        ("mask_of", lambda x: None),
        ("mask_of", lambda x: x.long()),
    ],
)
def test_refuses_bad_arguments(device, name, change):
    arguments = {"logits": torch.randn(4, 70, device=device), **case(4, 70, device)}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}:"):
        edit_logits(**arguments)


@pytest.mark.parametrize("name", ["prompt_length", "repetition", "biases", "bias_from", "bans"])
def test_refuses_bad_tables(device, name):
    arguments = {"logits": torch.randn(4, 70, device=device), **case(4, 70, device)}
    table = getattr(arguments["edits"], name)
    for bad in (table[:-1], table.double()):
        edits = dataclasses.replace(arguments["edits"], **{name: bad})
        with pytest.raises(ValueError, match=f"^{name}:"):
            edit_logits(**arguments | {"edits": edits})
