"""The workloads of the throughput bench: token-id prompts and output lengths, drawn with a fixed seed.

mini           256 requests, 100..1024 tokens in and out, uniform
single         1 request, 128 in, 512 out
prefill        64 requests, 2048 in, 1 out
shared_prefix  8 groups of 64 requests: 2048 tokens shared by the group and 128 of their own in, 128 out, shuffled
"""

from collections.abc import Callable
from random import Random

Workload = tuple[list[list[int]], list[int]]  # prompts, output lengths
MAX_ID = 10_000


def _ids(rng: Random, count: int) -> list[int]:
    return [rng.randint(0, MAX_ID) for _ in range(count)]


def mini(seed: int = 0) -> Workload:
    rng = Random(seed)
    prompts = [_ids(rng, rng.randint(100, 1024)) for _ in range(256)]
    return prompts, [rng.randint(100, 1024) for _ in prompts]


def single(seed: int = 0) -> Workload:
    return [_ids(Random(seed), 128)], [512]


def prefill(seed: int = 0) -> Workload:
    rng = Random(seed)
    return [_ids(rng, 2048) for _ in range(64)], [1] * 64


def shared_prefix(seed: int = 0) -> Workload:
    rng = Random(seed)
    prefixes = [_ids(rng, 2048) for _ in range(8)]
    prompts = [prefix + _ids(rng, 128) for prefix in prefixes for _ in range(64)]
    rng.shuffle(prompts)
    return prompts, [128] * len(prompts)


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "mini": mini,
    "single": single,
    "prefill": prefill,
    "shared_prefix": shared_prefix,
}
