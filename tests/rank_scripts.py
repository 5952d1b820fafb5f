"""What the processes of `tests.ranks` run, each as one rank; arguments are strings."""

import os
import time
from pathlib import Path

import torch

from minisgl.parallel import ParallelGroup, ProcessGroup, start_processes, stop_processes
from minisgl.sampler import Sampler
from tests.models.test_decoder import PagedModel

CPU = torch.device("cpu")
NEW_TOKENS = 6
PROMPT = [7, 300, 12, 5, 99, 240, 1, 33, 250, 8, 8, 61, 130, 2, 77, 254, 19]  # one id is outside the vocabulary


def exchange(group_size):
    """Every kind of exchange, in groups of a size."""
    world_rank, _ = start_processes("cpu", timeout_s=60)
    group = ProcessGroup(CPU, int(group_size))
    x = torch.tensor([[1.5, -2.0]]) * (world_rank + 1)
    residual = torch.tensor([[10.0, 20.0]])
    short, long = b"plan" * (world_rank + 1), bytes([world_rank]) * 10_000
    found = {
        "rank": tuple(group.ranks),
        "gather": group.gather(torch.tensor([world_rank], dtype=torch.int32)),
        "min": group.min(100 - world_rank),
        "sends": [group.send(message).hex() for message in (short, long, b"", long[:4088], long[:4089])],
        "normed": group.sum_and_norm(x.clone(), residual, torch.ones(2), 0.0),
        "residual": residual,
        "sum": group.sum(x),
    }
    if world_rank == 0:  # the others do not wait for it
        with group.rehearsal():
            found["rehearsed"] = group.sum(x.clone()), group.gather(x), group.num_exchanges
    terms = torch.randn(7, 33, generator=torch.Generator().manual_seed(world_rank))
    found |= {"terms": terms, "ordered": ProcessGroup(CPU, int(group_size), ordered=True).sum(terms.clone())}
    group.barrier()
    group.close()
    stop_processes()
    return found


def fail():
    """Rank 1 fails where the others wait for it."""
    rank, _ = start_processes("cpu", timeout_s=60)
    group = ProcessGroup(CPU, 2)
    1 / (1 - rank)
    group.barrier()


def sums(folder):
    """Sums through shared memory, by the kernels in the interpreter: launches of all kinds, interleaved."""
    from minisgl.kernels import all_reduce, launch
    from tests.interpreter import move_half_words_whole, patch_language_once

    assert launch.INTERPRET
    # Few programs, since the interpreter runs one after another, of several blocks each.
    all_reduce.CHANNELS, all_reduce.MAX_FLAT_BLOCK = 32, 256
    patch_language_once()
    move_half_words_whole()
    rank, num_ranks = start_processes("cpu", timeout_s=60)
    group = ProcessGroup(CPU, num_ranks)
    size = all_reduce.PeerMemory.num_bytes(num_ranks)
    paths = [f"{folder}/{peer}.memory" for peer in range(num_ranks)]
    own = torch.from_file(paths[rank], shared=True, size=size, dtype=torch.uint8)
    own.view(torch.int32).fill_(all_reduce.EMPTY.value)
    buffers = [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path in paths]
    memory = all_reduce.PeerMemory(buffers, rank)
    memory.one_shot_bytes = 20_000
    group.barrier()
    found = []
    for step, (rows, hidden, dtype) in enumerate(SUMS):
        x, residual, weight = terms(step, rank, rows, hidden, dtype)
        if step % (num_ranks + 1) == rank:
            time.sleep(0.1)  # later than the others
        if step % 4 == 0 and memory.holds_at_once(x):
            found.append((all_reduce.sum_and_norm(x, residual, weight, 1e-6, memory), residual))
        elif step % 4 == 1 and rows <= 8:
            found.append(all_reduce.sum_into_stream(x, residual, weight, 1e-6, memory)[:3])
        elif step % 4 == 2 and rows <= 8:
            found.append(all_reduce.sum_into_stream(x, None, weight, 1e-6, memory)[:3])
        elif step % 4 == 3:
            found.append((all_reduce.gather_of_ranks(x, memory),))
        else:
            found.append((all_reduce.sum_of_ranks(x, memory),))
    group.barrier()
    return found


SUMS = [(3, 1000, torch.float32), (1, 4096, torch.float16), (2, 1000, torch.float32), (5, 7, torch.float32)]
SUMS += [(140, 96, torch.float16), (4, 5000, torch.float16), (9, 1500, torch.float32), (3, 333, torch.float16)]
SUMS += [(40, 30, torch.float32), (10, 999, torch.float16), (1, 64, torch.float32), (70, 97, torch.float16)]
SUMS += [(77, 97, torch.float16), (9, 1, torch.float32), (1, 4095, torch.float16), (1, 1, torch.float32)]


def terms(step, rank, rows, hidden, dtype):
    """(x, residual, norm's weight) of a rank; the same but for x on all ranks."""
    shared, own = torch.Generator().manual_seed(step), torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(rows, hidden, generator=own).to(dtype)
    words = x.view(torch.int16 if dtype == torch.float16 else torch.int32)
    words[:, ::3] = -(1 << 15) if dtype == torch.float16 else 0x80008000 - (1 << 32)  # those that stand for no word
    words[:, 1::5] = torch.tensor(-0.0, dtype=dtype).view(words.dtype)
    return x, torch.randn(rows, hidden, generator=shared).to(dtype), torch.randn(hidden, generator=shared).to(dtype)


def answers(*folders):
    """Logits of a prompt, and greedy and drawn tokens after it, of the model in each folder."""
    start_processes("cpu", timeout_s=120)
    group = ProcessGroup(CPU, int(os.environ["WORLD_SIZE"]))
    found = {Path(folder).name: answers_of(Path(folder), group) for folder in folders}
    stop_processes()
    return found


def answers_of(folder, group=None):
    model = PagedModel(folder, group)
    shard = model.decoder.shard
    logits = model.step(prefill=[(0, PROMPT)])
    sampler = Sampler(shard, group or ParallelGroup())
    found = {"logits": logits[:, : shard.vocab.num_real].clone()}
    rows, seed = torch.arange(2, dtype=torch.int32), torch.tensor([5, 6])
    tables = torch.tensor([0.0, 1.2]), torch.tensor([0, 40], dtype=torch.int32), torch.tensor([1.0, 0.9])
    model.step(prefill=[(1, PROMPT)])
    logits, ids = logits.expand(2, -1).contiguous(), []
    for step in range(NEW_TOKENS):
        positions = torch.full((2,), len(PROMPT) + step, dtype=torch.int32)
        temperature, top_k, top_p = tables
        ids.append(sampler(logits, rows, positions, temperature, top_k, top_p, torch.zeros(2), seed).tolist())
        logits = model.step(decode=[(0, [ids[-1][0]]), (1, [ids[-1][1]])])
    return found | {"ids": ids}
