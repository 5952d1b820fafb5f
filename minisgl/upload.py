"""int32 arrays on their way to the device: many parts, one transfer.

Knows arrays. Does not know what they mean.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int32]


def ints(values: Sequence[int | None]) -> Ints:
    return np.array(values, np.int32)


def upload(device: torch.device, **parts: Ints) -> dict[str, torch.Tensor]:
    """Copy named parts  # [n] int32 to the device in one transfer."""
    sizes = [len(part) for part in parts.values()]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate(list(parts.values()), out=host.numpy(), casting="same_kind")
    return dict(zip(parts, host.to(device, non_blocking=True).split(sizes), strict=True))
