import itertools

import pytest
import torch

from minisgl.kernels.common_prefix import CHUNK, common_prefix_lengths, common_prefix_lengths_reference


def pack(sequences, device):
    """(packed tokens, starts, lengths); the ends are padded with a token that must not be compared."""
    tokens, starts = [-9], []
    for sequence in sequences:
        starts.append(len(tokens))
        tokens += [*sequence, -9]
    lengths = [len(sequence) for sequence in sequences]
    return (
        torch.tensor(tokens, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int64, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def pair_of(length, prefix, other_length):
    """Two sequences with a common prefix; all that follows differs."""
    shared = torch.randint(0, 1000, (prefix,)).tolist()
    return shared + [1001] * (length - prefix), shared + [1002] * (other_length - prefix)


def compare(pairs, device):
    queries, query_starts, query_lengths = pack([query for query, _ in pairs], device)
    keys, key_starts, key_lengths = pack([key for _, key in pairs], device)
    return common_prefix_lengths(queries, query_starts, keys, key_starts, torch.minimum(query_lengths, key_lengths))


@pytest.mark.parametrize("pairs", [1, 3, 40])
def test_finds_every_length(device, pairs):
    torch.manual_seed(pairs)
    cases, expected = [], []
    for prefix in itertools.islice(itertools.cycle([0, 1, 63, 500, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]), pairs):
        cases.append(pair_of(prefix + len(cases) % 3, prefix, prefix + len(cases) % 2))
        expected.append(prefix)
    out = compare(cases, device)
    assert out.dtype == torch.int32 and out.tolist() == expected


def test_equals_the_reference_on_repetitive_tokens(device):
    """Few distinct tokens: many places agree after the first difference."""
    torch.manual_seed(0)
    queries, keys = (torch.randint(0, 2, (20_000,), dtype=torch.int32, device=device) for _ in range(2))
    keys[:9000] = queries[:9000]
    query_starts = torch.randint(0, 9000, (30,), device=device)
    key_starts = torch.where(torch.arange(30, device=device) % 2 == 0, query_starts, query_starts + 3)
    lengths = torch.randint(0, 10_000, (30,), dtype=torch.int32, device=device)
    expected = common_prefix_lengths_reference(queries, query_starts, keys, key_starts, lengths.clone())
    assert torch.equal(common_prefix_lengths(queries, query_starts.int(), keys, key_starts, lengths), expected)
    assert expected.max() > 2 * CHUNK


def test_empty_and_equal_sequences(device):
    assert compare([([], []), ([1, 2], []), ([], [1]), ([1, 2, 3], [1, 2, 3])], device).tolist() == [0, 0, 0, 3]


def test_one_long_pair_among_many_short(device):
    cases = [pair_of(100_000, 99_990, 99_995), *(pair_of(9, 5, 7) for _ in range(15)), pair_of(50_000, 0, 50_000)]
    assert compare(cases, device).tolist() == [99_990, *[5] * 15, 0]


def test_neighbours_of_one_tensor(device):
    tokens, starts, lengths = pack([[1], [1, 2, 3], [1, 2, 4, 5], [7], [7, 8]], device)
    out = common_prefix_lengths(tokens, starts[:-1], tokens, starts[1:], torch.minimum(lengths[:-1], lengths[1:]))
    assert out.tolist() == [1, 2, 0, 1]


def test_no_pairs(device):
    assert compare([], device).shape == (0,)


@pytest.mark.parametrize(
    "place, change, name",
    [
        (0, lambda x: x.long(), "queries"),
        (0, lambda x: x[::2], "queries"),
        (1, lambda x: x[:-1], "query_starts"),
        (2, lambda x: x[None], "keys"),
        (3, lambda x: x.float(), "key_starts"),
        (4, lambda x: x.long(), "lengths"),
    ],
)
def test_refuses_bad_arguments(device, place, change, name):
    tokens, starts, lengths = pack([[1, 2], [3, 4]], device)
    arguments = [tokens, starts, tokens.clone(), starts.clone(), lengths]
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=f"^{name}:"):
        common_prefix_lengths(*arguments)
