import torch

from minisgl.kernels.sampling import sample


def launch() -> None:
    index, table = torch.empty(3, dtype=torch.int32), torch.empty(5)
    top_k, seed = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for vocab in (2048, 32000, 128256, 151936, 262144):
            logits = torch.empty(3, vocab, dtype=dtype)
            sample(logits, index, index, table, top_k, table, table, seed)
            sample(logits, index, index, table, top_k, table, table, seed, torch.empty(5, 64, dtype=torch.int32))
