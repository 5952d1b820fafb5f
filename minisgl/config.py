"""Every setting of the engine, with its default, range and help text. The command line is made from this table.

Knows names, ranges and defaults. Does not know devices or models: `resolve` replaces "auto" once.
"""

from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from minisgl.errors import MinisglError
from minisgl.parsers import FORMATS, STYLES


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    flag: str | None = None,
    or_file: bool = False,
) -> Any:
    """A dataclass field with what its command-line flag and its check need. `flag` renames or hides ("") the flag;
    `or_file`: the flag takes the text or the name of a file of it. A flag of a list is given once for each value."""
    facts = {"help": help, "choices": choices, "low": low, "high": high, "flag": flag, "or_file": or_file}
    return field(default=default, metadata=facts)


def type_of(setting: Field[Any]) -> tuple[type, bool]:
    """The type of a field's values, and whether it takes several: (str, True) of `str | Sequence[str] | None`."""
    kinds = get_args(setting.type) if isinstance(setting.type, UnionType) else (setting.type,)
    lists = [kind for kind in kinds if get_origin(kind) is Sequence]
    kind = get_args(lists[0])[0] if lists else next(kind for kind in kinds if kind is not NoneType)
    return kind, bool(lists)


@cache
def _checked_fields(owner: type) -> tuple[tuple[Field[Any], str], ...]:
    """The fields of a dataclass that `check_fields` looks at, with the names of their types: what is in a list is for
    its owner to say."""
    typed = [(setting, *type_of(setting)) for setting in fields(owner) if setting.metadata]
    return tuple((setting, kind.__name__) for setting, kind, is_list in typed if not is_list)


def accepted(setting: Field[Any]) -> str:
    """The accepted range of a field in words: 'one of radix, none', 'at least 1', 'from 0 to 1'."""
    choices, low, high = (setting.metadata[key] for key in ("choices", "low", "high"))
    if choices:
        return "one of " + ", ".join(choices)
    if low is not None and high is not None:
        return f"from {low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}"


def check_fields(settings: Any, error: Callable[[str], MinisglError]) -> None:
    """Check each field of a dataclass made of `option`s against its type and range; None always means 'default'."""
    for setting, kind in _checked_fields(settings.__class__):
        value = getattr(settings, setting.name)
        if value is None:
            continue
        if kind in ("int", "float"):
            right = isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
            if not right or value != value:
                raise error(f"{setting.name} is {value!r}; it must be {'an integer' if kind == 'int' else 'a number'}")
            low, high = setting.metadata["low"], setting.metadata["high"]
            if (low is not None and value < low) or (high is not None and value > high):
                raise error(f"{setting.name} is {value}; it must be {accepted(setting)}")
        elif kind == "bool":
            if not isinstance(value, bool):
                raise error(f"{setting.name} is {value!r}; it must be true or false")
        elif kind == "str":
            choices = setting.metadata["choices"]
            if not isinstance(value, str) or (choices and value not in choices):
                raise error(f"{setting.name} is {value!r}; it must be {accepted(setting) if choices else 'a string'}")


@dataclass(frozen=True)
class EngineConfig:
    """All engine settings. Frozen: `resolve` derives the resolved one, and everything later reads that."""

    model: str = option(
        "", "Model folder or Hugging Face id. [default: the demo model that ships with minisgl]", flag=""
    )
    dtype: str = option(
        "auto",
        "Weights and KV cache type; auto is the checkpoint's own on a GPU and float32 on a CPU.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is the GPU when there is one.")
    load_format: str = option("auto", "auto reads safetensors; dummy draws random weights.", choices=("auto", "dummy"))
    max_len: int | None = option(None, "Longest prompt plus output, in tokens. [default: the model's context]", low=2)
    max_running: int = option(256, "Most requests that run at once.", low=1, high=65536)
    # 66 tiles of 128 rows: what a matmul makes of them, 128 x 256 outputs each, comes out even on Hopper's 132
    # multiprocessors. On an H200, Qwen3-8B takes prompts 1% faster than with 8,192.
    max_step_tokens: int = option(8448, "Most tokens in one forward pass; longer prompts run in chunks.", low=1)
    page_size: int = option(64, "Tokens in one KV page: a power of two.", low=16, high=256)
    max_graph_batch: int = option(
        512, "Largest decode batch that is captured in a CUDA graph; 0 runs every step eagerly.", low=0, high=4096
    )
    cascade: bool = option(
        True, "Read a prefix that decoding requests share once for many of them.", flag="--cascade/--no-cascade"
    )
    deterministic: bool = option(
        False, "Give a request the same logits, bit for bit, whatever runs beside it. Slower; turns --cascade off."
    )
    overlap: bool = option(
        True, "Schedule and launch a step while the one before it runs.", flag="--overlap/--no-overlap"
    )
    num_pages: int | None = option(None, "KV pages. [default: what --memory-fraction leaves]", low=1)
    memory_fraction: float = option(
        0.9, "Share of the device's memory for weights, activations and KV.", low=0.05, high=0.99
    )
    cache: str = option("radix", "Prefix cache: radix reuses the KV of shared prefixes.", choices=("radix", "none"))
    evict: str = option("lru", "Which cached prefixes go first when pages run out.", choices=("lru", "lfu", "fifo"))
    reasoning_parser: str = option(
        "auto", "How answers mark their thinking; auto looks at the chat template.", choices=STYLES
    )
    tool_parser: str = option("auto", "How answers write tool calls; auto looks at the chat template.", choices=FORMATS)
    tp: int = option(1, "GPUs (with --device cpu: processes) that hold the model; torchrun sets it.", low=1, high=64)
    dp: int = option(1, "Engines, each on --tp GPUs of its own, that share the work.", low=1, high=64)
    watchdog_s: float = option(20.0, "With --tp or --dp, end the job when a step takes longer: it hangs.", low=1)
    seed: int = option(0, "Seed of requests that name none, and of dummy weights.", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        check_fields(self, MinisglError)
        if self.page_size & (self.page_size - 1):
            raise MinisglError(f"page_size is {self.page_size}; it must be a power of two from 16 to 256")
