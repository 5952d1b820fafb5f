import torch

from minisgl.kernels.embedding import embedding, embedding_stream


def launch() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        sizes = ((2048, 256), (32000, 1000), (2000, 1024), (2000, 4096))
        for vocab, hidden in sizes if dtype == torch.bfloat16 else sizes[1:2]:
            ids, weight = torch.empty(4, dtype=torch.int32), torch.empty(vocab, hidden, dtype=dtype)
            embedding(ids, weight)
            embedding_stream(ids, weight, weight[0], 1e-6)
