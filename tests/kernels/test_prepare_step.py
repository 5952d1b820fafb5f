import pytest
import torch

from minisgl.kernels.prepare_step import prepare_step, prepare_step_reference

PAGE = 16


def table(device):
    """A row table of 6 rows and 640 tokens, with everything unused poisoned."""
    pages = torch.randperm(6 * 40, dtype=torch.int32, device=device).view(6, 40)
    tokens = torch.full((6, 640), -9, dtype=torch.int32, device=device)
    return tokens, torch.full((6,), -9, dtype=torch.int32, device=device), pages


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("counts, decodes", [([1, 1, 1], 3), ([300], 0), ([1, 1, 257, 16, 1], 2), ([1, 63], 1)])
def test_matches_the_reference(device, counts, decodes):
    sequences = len(counts)
    tokens, length, pages = table(device)
    rows = torch.randperm(6, device=device)[:sequences].int()
    offsets = ints([sum(counts[:i]) for i in range(sequences + 1)], device)
    starts = ints([-1] * decodes + [16 * (i % 3) for i in range(sequences - decodes)], device)
    store_from = starts.clamp_min(0) + ints([0] * decodes + [7] * (sequences - decodes), device)
    for i in range(decodes):
        length[rows[i]] = 30 + i
        tokens[rows[i], 30 + i] = 100 + i
    ids = torch.randint(0, 1000, (sum(counts),), dtype=torch.int32, device=device)

    want_tokens, want_length = tokens.clone(), length.clone()
    want = prepare_step_reference(rows, starts, offsets, store_from, ids, want_tokens, want_length, pages, PAGE)
    out = prepare_step(rows, starts, offsets, store_from, ids, max(counts), tokens, length, pages, PAGE)

    assert torch.equal(tokens, want_tokens) and torch.equal(length, want_length)
    for name in ("input_ids", "positions", "slots", "kv_lens"):
        assert torch.equal(getattr(out, name), getattr(want, name).int()), name


def test_a_decoding_row_goes_on_from_its_length(device):
    tokens, length, pages = table(device)
    length[2], tokens[2, 33] = 33, 77
    one = ints([2], device)
    out = prepare_step(
        one,
        ints([-1], device),
        ints([0, 1], device),
        ints([0], device),
        ints([0], device),
        1,
        tokens,
        length,
        pages,
        PAGE,
    )
    assert (out.input_ids.item(), out.positions.item(), out.kv_lens.item(), length[2].item()) == (77, 33, 34, 34)
    assert out.slots.item() == pages[2, 2].item() * PAGE + 1


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 0, 700], [1, 0, 0]])
def test_padding_touches_no_table(device, reference, counts):
    tokens, length, pages = table(device)
    length[3], tokens[3, 20] = 20, 5
    before = tokens.clone(), length.clone()
    offsets = ints([0, 1, 1 + counts[1], sum(counts)], device)
    arguments = (ints([3, -1, -1], device), ints([-1] * 3, device), offsets, ints([0] * 3, device))
    ids = ints([9] * sum(counts), device)
    if reference:
        out = prepare_step_reference(*arguments, ids, tokens, length, pages, PAGE)
    else:
        out = prepare_step(*arguments, ids, max(counts), tokens, length, pages, PAGE)
    padding = sum(counts) - 1
    assert out.input_ids.tolist() == [5] + [0] * padding and out.positions.tolist() == [20] + [0] * padding
    assert out.slots[1:].tolist() == [-1] * padding and out.kv_lens.tolist() == [21, 0, 0]
    before[1][3] = 21
    assert torch.equal(tokens, before[0]) and torch.equal(length, before[1])


def test_stored_tokens_are_not_stored_again(device):
    tokens, length, pages = table(device)
    out = prepare_step(
        ints([0], device),
        ints([31], device),
        ints([0, 1], device),
        ints([32], device),
        ints([5], device),
        1,
        tokens,
        length,
        pages,
        PAGE,
    )
    assert out.slots.item() == -1


def test_refuses_bad_arguments(device):
    tokens, length, pages = table(device)
    with pytest.raises(ValueError, match="^offsets:"):
        prepare_step(
            ints([0], device),
            ints([-1], device),
            ints([0], device),
            ints([0], device),
            ints([0], device),
            1,
            tokens,
            length,
            pages,
            PAGE,
        )
    with pytest.raises(ValueError, match="^length: expected int32"):
        prepare_step(
            ints([0], device),
            ints([-1], device),
            ints([0, 1], device),
            ints([0], device),
            ints([0], device),
            1,
            tokens,
            length.long(),
            pages,
            PAGE,
        )
