"""What every launcher asks before it launches: does Triton run here, and on which architecture.

Knows: devices and Triton's interpreter. Knows nothing of any kernel.
"""

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

log = logging.getLogger("minisgl")
# Triton 3.9 warns at each start that 3.10 will round products before it adds, unless somebody says what is wanted.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HOPPER_MODULES = "attention_prefill_sm90", "heads_matmul_sm90", "matmul_sm90", "prefill_matmul_sm90"


def use_triton(x: torch.Tensor) -> bool:
    """True when the Triton kernel runs for `x`; False when the launcher runs its torch reference (CPU tensors)."""
    return x.is_cuda or INTERPRET


def use_device(device: torch.device) -> None:
    """Make it this thread's current one, on which Triton launches whatever its arguments' is; the first, until told."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@cache
def architecture(device: torch.device) -> str:
    """'sm_90', 'gfx942', ... of a device: the key of the tile tables. CPU tensors (interpreter) give 'cpu'."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def hopper_module(name: str, device: torch.device) -> ModuleType | None:
    """The module of a kernel in Gluon for sm_90; None for another device, and, with a warning, where Triton has no
    Gluon, or one with other names than those it knows."""
    if architecture(device) != "sm_90":
        return None
    try:
        return import_module(f"minisgl.kernels.{name}")
    except (ImportError, AttributeError) as error:
        log.warning("%s does not load with this Triton, and a slower kernel takes its place: %s", name, error)
        return None


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device, for launches of one program each; CPU tensors (interpreter) give 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up. Triton's own is for kernels: on the host it takes ten times as long."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least power of two that is not below x, which is positive. As `cdiv`."""
    return 1 << (x - 1).bit_length()


def check(condition: bool, message: str) -> None:
    """Raise ValueError with `message`, which starts with the argument's name, unless the condition holds. Not for
    launchers that each layer of an eager step calls: there, messages made for nothing take a fifth of the time."""
    if not condition:
        raise ValueError(message)


def check_same(name: str, x: torch.Tensor, *, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError unless `x` has this device and dtype."""
    if x.device != device:
        raise ValueError(f"{name}: is on {x.device}, expected {device}")
    if x.dtype != dtype:
        raise ValueError(f"{name}: has dtype {x.dtype}, expected {dtype}")
