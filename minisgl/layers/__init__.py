"""Weights plus one kernel call each.

Layers are made with `empty`, which allocates a parameter of a given shape in the model's dtype on its device.
`targets()` names what a checkpoint fills: its tensor names, relative to the layer, and the parameter rows they go to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from minisgl.shards import Cut

Empty = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Target:
    """The parameter rows that a checkpoint's tensor fills on this rank, where one of its dimensions may be cut."""

    parameter: torch.Tensor
    cut: Cut
    dim: int = 0  # that is cut

    @classmethod
    def uncut(cls, parameter: torch.Tensor) -> "Target":
        return cls(parameter, Cut.none(len(parameter)))

    @property
    def shape(self) -> list[int]:
        """Of the checkpoint's tensor."""
        shape = list(self.parameter.shape)
        shape[self.dim] = self.cut.whole
        return shape


class Layer(Protocol):
    def targets(self) -> dict[str, Target]: ...


def join(layers: Mapping[str, Layer]) -> dict[str, Target]:
    """The targets of several layers, each under its layer's name in the checkpoint."""
    return {f"{prefix}.{name}": x for prefix, layer in layers.items() for name, x in layer.targets().items()}
