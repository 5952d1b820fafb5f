import torch

from minisgl.kernels.logprobs import logprobs


def launch() -> None:
    ids = torch.empty(3, dtype=torch.int32)
    logprobs(torch.empty(3, 151936, dtype=torch.bfloat16), ids, 20)
    logprobs(torch.empty(3, 2048), ids, 0)
