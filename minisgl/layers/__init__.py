"""Weights plus one kernel call each. A layer is a callable: `Linear(...)(x)`.

Layers are made with `empty`, which allocates a parameter of a given shape in the model's dtype on its device.
`tensors()` names what a checkpoint fills: its tensor names, relative to the layer, and the parameter rows they go to.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

Empty = Callable[..., torch.Tensor]


class Layer(Protocol):
    def tensors(self) -> dict[str, torch.Tensor]: ...


def join(layers: Mapping[str, Layer]) -> dict[str, torch.Tensor]:
    """The tensors of several layers, each under its layer's name in the checkpoint."""
    return {f"{prefix}.{name}": x for prefix, layer in layers.items() for name, x in layer.tensors().items()}
