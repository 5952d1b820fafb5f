"""Sampling: ids against the reference's, kept sets against transformers', frequencies against the exact distribution.

The interpreter takes a quarter of a second for a filtered sample: on a CPU few samples go through the kernel, and many
through the reference that it must equal.
"""

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minisgl.kernels import gumbel, sampling
from minisgl.kernels.gumbel import gumbel_reference, random_bits_reference
from minisgl.kernels.sampling import sample, sample_reference
from minisgl.kernels.token_filters import Tile, kept_reference
from minisgl.kernels.vocab_blocks import BLOCK, blocks_reference

HAS_GPU = torch.cuda.is_available()
INF = float("inf")


def parameters(samples, device, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=None):
    """Arguments of `sample` after the logits: each parameter a number, or one value for every sample."""

    def table(value, dtype):
        values = torch.as_tensor(value, dtype=dtype, device=device)
        return values.expand(samples).contiguous()

    index = torch.arange(samples, dtype=torch.int32, device=device)
    seed = torch.arange(samples) * 0x9E3779B97F4A7C1 - 2**62 if seed is None else seed
    return {
        "rows": index,
        "positions": index * 37,
        "temperature": table(temperature, torch.float32),
        "top_k": table(top_k, torch.int32),
        "top_p": table(top_p, torch.float32),
        "min_p": table(min_p, torch.float32),
        "seed": table(seed, torch.int64),
    }


def assert_same_choice(ids, logits, options):
    """Each id is the reference's, or was drawn with a score within rounding of it, from kept tokens."""
    expected = sample_reference(logits, **options)
    different = (ids != expected).nonzero().squeeze(1)
    assert len(different) <= 0.02 * len(ids), f"{len(different)} of {len(ids)} ids differ"
    for place in different.tolist():
        row = options["rows"][place : place + 1].long()
        filters = [options[name][row] for name in ("temperature", "top_k", "top_p", "min_p")]
        seed, position, one = options["seed"][row], options["positions"][place : place + 1], logits[place][None].float()
        scores = (one / filters[0]).masked_fill(~kept_reference(one, *filters), -INF)
        chosen = torch.stack([ids[place], expected[place]]).long()
        if chosen[0] // BLOCK != chosen[1] // BLOCK:
            scores = blocks_reference(scores).logsumexp(-1)
            scores += gumbel_reference(seed, position, torch.arange(scores.shape[1], device=ids.device), gumbel.BLOCKS)
            of_ids = scores[0, chosen // BLOCK]
        else:
            of_ids = scores[0, chosen] + gumbel_reference(seed, position, chosen, gumbel.TOKENS)[0]
        torch.testing.assert_close(of_ids[0], of_ids[1], rtol=1e-5, atol=1e-4)


def test_random_bits_are_philox():
    # Known answer of Random123 for a zero key and counter.
    zero = torch.zeros(1, dtype=torch.int64)
    numbers = torch.arange(5000)
    bits = random_bits_reference(zero, zero, numbers, gumbel.TOKENS)
    assert bits[0, 0] == 0x6627E8D5
    assert len(bits[0].unique()) == 5000
    assert not (bits == random_bits_reference(zero, zero, numbers, gumbel.BLOCKS)).any()
    assert torch.equal(random_bits_reference(zero, zero, numbers[None, 70:90], gumbel.TOKENS), bits[:, 70:90])


@pytest.mark.parametrize("vocab", [1, 63, 4096, 5001] + [151_936] * HAS_GPU)
def test_noise_of_the_kernel_is_the_reference_noise(device, vocab):
    samples = 200 if HAS_GPU else 12
    logits = torch.zeros(samples, vocab, device=device)
    options = parameters(samples, device)
    ids = sample(logits, **options)
    assert_same_choice(ids, logits, options)
    if vocab > 4000:
        assert len(ids.unique()) > 0.9 * samples


FILTERS = {
    "plain": {},
    "top_k": {"top_k": 20},
    "top_k_1": {"top_k": 1},
    "top_k_large": {"top_k": 1500},  # more than the first list holds: a longer one
    "top_k_of_all": {"top_k": 10_000},
    "top_p": {"top_p": 0.4},
    "top_p_0": {"top_p": 0.0},
    "top_p_wide": {"top_p": 0.98, "temperature": 3.0},  # likewise
    "min_p": {"min_p": 0.1},
    "min_p_1": {"min_p": 1.0},
    "min_p_wide": {"min_p": 0.001, "temperature": 3.0},  # likewise
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 0.6},
    "all_wide": {"top_k": 2000, "top_p": 0.95, "min_p": 1e-5, "temperature": 2.0},
    "cold": {"temperature": 2e-5, "top_k": 10},
}


@pytest.mark.parametrize("name", FILTERS)
def test_ids_equal_the_reference(device, dtype, name):
    samples = 100 if HAS_GPU else 2
    torch.manual_seed(len(name))
    logits = (torch.randn(samples, 5003, device=device) * 2).to(dtype)
    options = parameters(samples, device, **FILTERS[name])
    assert_same_choice(sample(logits, **options), logits, options)


@pytest.mark.parametrize("vocab", [1, 2, 127, 1000, 4097] + [32_001, 151_936, 200_003] * HAS_GPU)
def test_mixed_batches_equal_the_reference(device, vocab):
    """Every row has its own mix of parameters, at random; rows are scattered in larger tables."""
    samples = 300 if HAS_GPU else 8
    generator = torch.Generator().manual_seed(vocab)

    def some(values, off):
        return torch.where(torch.rand(samples, generator=generator) < 0.5, values, off)

    def random():
        return torch.rand(samples, generator=generator)

    logits = (torch.randn(samples, vocab, generator=generator) * 3).to(device)
    options = parameters(
        samples,
        device,
        temperature=some(random() * 2, 0.0),
        top_k=some(random() * 100, 0.0).int(),
        top_p=some(random(), 1.0),
        min_p=some(random() * 0.3, 0.0),
    )
    options["rows"] = torch.randperm(samples, generator=generator).int().to(device)
    ids = sample(logits, **options)
    assert_same_choice(ids, logits, options)
    assert ids.dtype == torch.int32 and ((ids >= 0) & (ids < vocab)).all()


def test_a_large_vocabulary(device):
    """Qwen3's, with every kind of row: both first lists suffice, the second is needed, and all blocks are."""
    torch.manual_seed(2)
    logits = (torch.randn(6, 151_936) * 3).half().to(device)
    options = parameters(
        6,
        device,
        temperature=[0.0, 1.0, 0.6, 0.4, 1.0, 1.0],
        top_k=[0, 0, 20, 0, 400, 0],
        top_p=[1.0, 1.0, 0.95, 0.9, 0.95, 0.98],
    )
    assert torch.equal(sample(logits, **options), sample_reference(logits, **options))


@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [(7, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (40, 0.8, 0.0), (0, 0.95, 0.1), (500, 0.9, 0.01)],
)
def test_kept_tokens_equal_transformers(top_k, top_p, min_p):
    torch.manual_seed(0)
    logits, temperature = torch.randn(50, 1000) * 3, 0.8
    scores = logits / temperature
    warpers = [MinPLogitsWarper(min_p)]
    if top_p < 1:
        warpers.insert(0, TopPLogitsWarper(top_p))
    if top_k > 0:
        warpers.insert(0, TopKLogitsWarper(top_k))
    for warper in warpers:
        scores = warper(None, scores)
    full = [torch.full((50,), value) for value in (temperature, float(top_k), top_p, min_p)]
    kept = kept_reference(logits, full[0], full[1].int(), full[2], full[3])
    assert torch.equal(kept, scores > -INF)


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.5}], ids=lambda options: next(iter(options))
)
def test_every_kept_token_and_no_other_is_sampled(device, options):
    samples = 2000 if HAS_GPU else 14
    logits = torch.full((4200,), -8.0)
    logits[[5, 1500, 4100]] = 2.0  # one in each block, all tied
    logits[[6, 4101]] = 1.0
    logits = logits.to(device).expand(samples, -1)
    ids = sample(logits, **parameters(samples, device, temperature=0.5, **options))
    assert set(ids.tolist()) == {5, 1500, 4100}


def test_ties_at_a_threshold_are_all_kept(device):
    """300 tokens tie at the k-th place, in more blocks than the first list holds."""
    samples = 2000 if HAS_GPU else 6
    logits = torch.zeros(300 * BLOCK, device=device)
    logits[::BLOCK] = 4.0
    logits[7] = 5.0
    assert sampling.TILE.first_list < 300
    ids = sample(logits.expand(samples, -1), **parameters(samples, device, top_k=10))
    assert ((ids % BLOCK == 0) | (ids == 7)).all()
    assert len(ids.unique()) > (250 if HAS_GPU else 4)


@pytest.mark.parametrize("name", FILTERS)
def test_no_tile_changes_an_id(device, dtype, monkeypatch, name):
    """Lists of 4 blocks at first: two more attempts and many reads for the same ids."""
    samples = 100 if HAS_GPU else 2
    torch.manual_seed(len(name))
    logits = (torch.randn(samples, 5003, device=device) * 2).to(dtype)
    options = parameters(samples, device, **FILTERS[name])
    expected = sample(logits, **options)
    monkeypatch.setattr(sampling, "TILE", Tile(num_warps=8, read_blocks=8, first_list=4, list_growth=4, ways=4))
    assert (sample(logits, **options) == expected).float().mean() > 0.98  # masses may round differently


def test_greedy_takes_the_first_maximum(device, dtype):
    logits = torch.randn(5, 9000, device=device).to(dtype)
    logits[0, [4000, 8000, 8500]] = 9.0  # ties across blocks and inside one
    logits[1, [1030, 7]] = 9.0
    logits[2] = -0.0
    logits[2, 5:] = 0.0
    options = parameters(5, device, temperature=0.0, top_k=5, top_p=0.5, min_p=0.9)
    expected = logits.argmax(-1).int()
    assert torch.equal(sample(logits, **options), expected)
    assert torch.equal(sample_reference(logits, **options), expected)
    assert expected[:3].tolist() == [4000, 7, 0]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 2e-5}])
def test_extreme_parameters_are_greedy(device, options):
    logits = torch.randn(3, 777, device=device)
    assert torch.equal(sample(logits, **parameters(3, device, **options)), logits.argmax(-1).int())


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_masked_and_broken_logits(device, options, kernel):
    """-inf is never sampled, and 0 is written where all are; NaN counts as -inf, +inf as the largest float."""
    logits = torch.full((6, 4500), -INF, device=device)
    logits[1, 4321] = -1e30
    logits[2, 17] = INF
    logits[2, 18:] = 5.0
    logits[3, 4400:] = torch.nan
    logits[3, 200] = 0.5
    logits[4] = torch.nan
    logits[5, 4499] = torch.finfo(torch.float32).max
    arguments = parameters(6, device, **options)
    tokens = torch.full((6, 256), 9, dtype=torch.int32, device=device)
    out = (sample if kernel else sample_reference)(logits, **arguments, tokens=tokens)
    assert out.tolist() == [-1, 4321, 17, 200, -1, 4499]
    assert tokens[arguments["rows"].long(), arguments["positions"].long()].tolist() == out.clamp_min(0).tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 30, "top_p": 0.9}], ids=["plain", "filtered"])
def test_an_id_does_not_depend_on_the_batch(device, dtype, options):
    samples = 64 if HAS_GPU else 5
    logits = torch.randn(samples, 4500, device=device).to(dtype)
    arguments = parameters(samples, device, **options)
    together = sample(logits, **arguments)
    for place in range(0, samples, 2):
        one = arguments | {name: arguments[name][place : place + 1] for name in ("rows", "positions")}
        assert torch.equal(sample(logits[place : place + 1], **one), together[place : place + 1])


def test_seed_and_position_change_the_outcome_and_nothing_else_does(device):
    samples = 8
    logits = torch.zeros(samples, 2000, device=device)
    options = parameters(samples, device, seed=2**40 + 1)
    ids = sample(logits, **options)
    assert len(ids.unique()) == samples  # positions differ
    assert torch.equal(sample(logits, **options), ids)
    high = options | {"seed": options["seed"] + 2**32}  # the upper half of the seed counts
    low = options | {"seed": options["seed"] + 1}
    assert not (sample(logits, **high) == ids).any() and not (sample(logits, **low) == ids).any()
    same = options | {"positions": torch.full_like(options["positions"], 5)}
    assert len(sample(logits, **same).unique()) == 1


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02}])
def test_frequencies_follow_the_distribution(device, options):
    """Chi-square of 40,000 samples of one distribution; seeded, so it passes or fails for good."""
    samples, vocab = 40_000, 40
    torch.manual_seed(1)
    logits = torch.randn(vocab, device=device) * 1.5
    arguments = parameters(samples, device, seed=11, **options)
    ids = (sample if HAS_GPU else sample_reference)(logits.expand(samples, -1), **arguments)

    first = {name: arguments[name][:1] for name in ("temperature", "top_k", "top_p", "min_p")}
    kept = kept_reference(logits[None], **first)[0]
    expected = (logits / first["temperature"]).masked_fill(~kept, -INF).double().softmax(-1) * samples
    counts = torch.bincount(ids, minlength=vocab).double()
    assert (counts[~kept] == 0).all()
    chi_square = ((counts - expected)[kept].square() / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_blocks_are_taken_by_their_mass(device):
    """A block of ids is drawn first: tokens of all blocks must keep their shares."""
    samples, vocab = 20_000, 9000
    logits = torch.full((vocab,), -INF, device=device)
    tokens = torch.tensor([0, 1, 4095, 4096, 8191, 8192, 8999], device=device)
    logits[tokens] = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 1.5, -2.0], device=device)
    arguments = parameters(samples, device, seed=7, temperature=0.8)
    ids = (sample if HAS_GPU else sample_reference)(logits.expand(samples, -1), **arguments)
    expected = (logits[tokens] / 0.8).double().softmax(-1) * samples
    counts = torch.bincount(ids, minlength=vocab).double()[tokens]
    assert counts.sum() == samples
    assert ((counts - expected).square() / expected).sum() < 6 + 4 * 12**0.5


def test_rare_tokens_keep_their_share():
    """Large noise has a fine grain: a token of probability 2^-16 is taken about 16 times in 2^20 draws."""
    positions = torch.arange(2**20)
    noise = gumbel_reference(torch.full_like(positions, 3), positions, torch.arange(2), gumbel.TOKENS)
    assert noise.isfinite().all()
    rare = (noise[:, 1] - 16 * torch.log(torch.tensor(2.0)) > noise[:, 0]).sum()
    assert abs(rare - 16) < 4 * 16**0.5
    quantile = -torch.log(-torch.log(torch.tensor(1 - 2.0**-14)))  # of the largest of 2^14
    above = (noise[:, 0] > quantile).sum()
    assert abs(above - 64) < 4 * 64**0.5


def test_writes_tokens_and_overwrites_poison(device, monkeypatch):
    logits = torch.randn(3, 4200, device=device)
    options = parameters(5, device, top_k=[5, 0, 3, 0, 0], temperature=[1.0, 1.0, 1.0, 0.0, 0.5])
    options["rows"], options["positions"] = options["rows"][[3, 0, 4]], options["positions"][[1, 2, 0]]
    expected = sample_reference(logits, **options)
    empty = torch.empty

    def poisoned(*size, **how):
        out = empty(*size, **how)
        return out.fill_(torch.nan if out.is_floating_point() else 123_456_789)

    monkeypatch.setattr(torch, "empty", poisoned)
    for place in (sample, sample_reference):
        tokens = torch.full((5, 100), -7, dtype=torch.int32, device=device)
        assert torch.equal(place(logits, **options, tokens=tokens), expected)
        written = torch.full_like(tokens, -7)
        written[options["rows"].long(), options["positions"].long()] = expected
        assert torch.equal(tokens, written)


@pytest.mark.parametrize("function", [sample, sample_reference])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 3}])
def test_padding_touches_no_table(device, function, options):
    logits = torch.randn(3, 500, device=device)
    arguments = parameters(3, device, **options)
    expected = function(logits, **arguments)
    arguments["rows"][1] = -1
    tokens = torch.full((3, 100), -9, dtype=torch.int32, device=device)
    ids = function(logits, **arguments, tokens=tokens)
    assert ids.tolist() == [expected[0], 0, expected[2]]
    assert (tokens != -9).sum() == 2


def test_reads_a_strided_view(device, dtype):
    padded = torch.full((4, 600), torch.nan, device=device, dtype=dtype)
    padded[:, :501] = torch.randn(4, 501, device=device).to(dtype)
    options = parameters(4, device, top_k=[0, 5, 0, 0], temperature=[1.0, 1.0, 0.0, 0.5])
    assert torch.equal(sample(padded[:, :501], **options), sample(padded[:, :501].contiguous(), **options))


def test_no_samples(device):
    options = parameters(3, device)
    options["rows"] = options["positions"] = torch.empty(0, dtype=torch.int32, device=device)
    assert sample(torch.empty(0, 50, device=device), **options).shape == (0,)


@pytest.mark.parametrize(
    "name, change",
    [
        ("logits", lambda x: x.double()),
        ("logits", lambda x: x.t().contiguous().t()),
        ("rows", lambda x: x.long()),
        ("positions", lambda x: x[:-1]),
        ("temperature", lambda x: x.double()),
        ("top_k", lambda x: x[:-1]),
        ("top_p", lambda x: x.half()),
        ("min_p", lambda x: x[None]),
        ("seed", lambda x: x.int()),
        ("tokens", lambda x: x[:-1]),
    ],
)
def test_refuses_bad_arguments(device, name, change):
    arguments = {
        "logits": torch.randn(4, 20, device=device),
        **parameters(4, device),
        "tokens": torch.zeros(4, 9, dtype=torch.int32, device=device),
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}:"):
        sample(**arguments)
