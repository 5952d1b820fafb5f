import torch

from minisgl.kernels.all_reduce import (
    ONE_SHOT_BYTES,
    PeerMemory,
    gather_of_ranks,
    sum_and_norm,
    sum_into_stream,
    sum_of_ranks,
)


def launch() -> None:
    for num_ranks in (2, 4, 8):
        buffer = torch.empty(PeerMemory.num_bytes(num_ranks), dtype=torch.uint8)
        memory = PeerMemory([buffer] * num_ranks, rank=1)
        # A compiler treats types and numbers of ranks apart: not each with each.
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if num_ranks == 2 else (torch.bfloat16,):
            for hidden in (1000, 4096, 5120, 12288) if num_ranks == 2 and dtype == torch.bfloat16 else (4096,):
                x, weight = torch.empty(5, hidden, dtype=dtype), torch.empty(hidden, dtype=dtype)
                if memory.holds_at_once(x):
                    sum_and_norm(x, x, weight, 1e-6, memory)
                sum_into_stream(x, x, weight, 1e-6, memory)
                sum_into_stream(x, None, weight, 1e-6, memory)
            sum_of_ranks(x, memory)
            gather_of_ranks(torch.empty(256, 64), memory)
            if num_ranks in ONE_SHOT_BYTES and num_ranks > 2:
                sum_of_ranks(torch.empty(2 << 20, dtype=dtype), memory)  # two shots
