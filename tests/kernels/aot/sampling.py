import torch

from minisgl.kernels.sampling import sample


def launch() -> None:
    index, table = torch.empty(3, dtype=torch.int32), torch.empty(5)
    top_k, seed = torch.empty(5, dtype=torch.int32), torch.empty(5, dtype=torch.int64)
    tokens = torch.empty(5, 64, dtype=torch.int32)
    for logits, out in ((torch.empty(3, 151936, dtype=torch.bfloat16), tokens), (torch.empty(3, 2048), None)):
        sample(logits, index, index, table, top_k, table, table, seed, out)
