"""The order in which a burst of requests is started: shared prefixes as neighbours, the longest work first.

Knows prompts. Does not know pages or steps.
"""

import numpy as np
import numpy.typing as npt
import torch

from minisgl.kernels.common_prefix import common_prefix_lengths
from minisgl.kernels.launch import use_device
from minisgl.radix_cache import common_prefix_length
from minisgl.request import Request

# The host compares fewer prompts, and longer ones. It takes 2.4 us a pair and 0.7 us a thousand tokens; the device
# 150 us, and 1.8 us a thousand tokens, most of it for bringing them there. On an H200, 512 x 1024 tokens take 1.3 ms on
# the host and 0.8 ms on the device, 4096 x 1024 take 13.1 and 7.3, 256 x 4096 take 0.95 and 1.16.
KERNEL_MIN_PROMPTS = 128
KERNEL_MAX_TOKENS = 2048  # of a prompt, in the mean


def plan_order(requests: list[Request], page_size: int, device: torch.device) -> list[Request]:
    """Requests that share at least a page of prefix come together, so that the first computes it and the rest find it;
    groups come in the order of their largest request, so that no long one is left to run alone at the end."""
    if len(requests) < 2:
        return requests
    # Big-endian bytes sort as the token ids do.
    ordered = sorted(requests, key=lambda request: request.tokens[: request.num_prompt].astype(">u4").tobytes())
    shared = neighbour_prefix_lengths([request.tokens[: request.num_prompt] for request in ordered], device)
    borders = [0, *(np.flatnonzero(shared < page_size) + 1).tolist(), len(ordered)]
    groups = [ordered[first:last] for first, last in zip(borders, borders[1:], strict=False)]
    groups.sort(key=lambda group: (-max(request.max_total for request in group), group[0].index))
    return [request for group in groups for request in group]


def neighbour_prefix_lengths(prompts: list[npt.NDArray[np.int32]], device: torch.device) -> npt.NDArray[np.int32]:
    """Common prefix length of each prompt and the next  # [len(prompts) - 1]: one launch for a large burst."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if device.type != "cuda" or len(prompts) < KERNEL_MIN_PROMPTS or lengths.mean() > KERNEL_MAX_TOKENS:
        pairs = zip(prompts, prompts[1:], strict=False)
        return np.array([common_prefix_length(a, b) for a, b in pairs], np.int32)
    use_device(device)  # the kernel is launched on the current one
    tokens = torch.from_numpy(np.concatenate(prompts)).to(device)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)])).to(device)
    shared = torch.from_numpy(np.minimum(lengths[:-1], lengths[1:])).to(device)
    found: npt.NDArray[np.int32] = common_prefix_lengths(tokens, starts[:-1], tokens, starts[1:], shared).cpu().numpy()
    return found
