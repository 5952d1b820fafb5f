"""config.json -> ModelConfig: everything the decoder and the engine need to know of a model, resolved once.

Knows the JSON layouts of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`). Does not know tensors, and imports neither torch nor transformers.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from minisgl.errors import MinisglError
from minisgl.models.families import FAMILIES, Family

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 256  # what the attention kernels have tiles for


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: the base and how it is stretched to longer texts. `rope.py` has the formulas."""

    type: str = "default"  # one of ROPE_TYPES
    theta: float = 10000.0
    factor: float = 1.0  # linear, llama3, yarn: how many times longer than `original_len`
    original_len: int = 0  # llama3, yarn: context length of the pre-training, in tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions
    attention_factor: float | None = None  # yarn: None derives it from factor and the mscales
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are element counts; `dtype` is the type that the checkpoint was saved in."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int  # longest text in tokens, YaRN's stretch included
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # for each layer the number of latest tokens that attention sees; 0: all of them
    dtype: str  # one of DTYPES; bfloat16 when config.json does not say
    eos_ids: tuple[int, ...]
    bos_id: int | None

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `folder`/config.json. MinisglError when it is missing, broken, or asks for something unsupported."""
        path = folder / "config.json"
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except MinisglError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
            raise MinisglError(f"{path} has a value of a wrong type ({error}); download the model again") from error

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Interpret the parsed config.json of any supported family."""
        family = _family(raw)
        given = {key: value for key, value in {**family.defaults, **raw}.items() if value is not None}
        _refuse_unsupported(given)

        num_heads = _size(given, "num_attention_heads")
        num_kv_heads = _size(given, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise MinisglError(
                f"config.json: {num_heads} attention heads cannot share {num_kv_heads} KV heads evenly; "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        hidden_size = _size(given, "hidden_size")
        if "head_dim" not in given and hidden_size % num_heads:
            raise MinisglError(
                f"config.json: there is no head_dim, and {num_heads} heads do not divide hidden_size {hidden_size}"
            )
        head_dim = _size(given, "head_dim", hidden_size // num_heads)
        if head_dim % 8 or head_dim > MAX_HEAD_DIM:
            raise MinisglError(
                f"config.json: head_dim {head_dim} is not supported; it must be a multiple of 8 up to 256"
            )

        num_layers = _size(given, "num_hidden_layers")
        rope, stretched_len = _rope(given)
        return cls(
            architecture=family.architecture,
            vocab_size=_size(given, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=_size(given, "intermediate_size"),
            rms_norm_eps=_positive("rms_norm_eps", given.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=max(_size(given, "max_position_embeddings"), stretched_len),
            rope=rope,
            tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
            qkv_bias=_flag(given, family.qkv_bias),
            o_bias=_flag(given, family.o_bias),
            mlp_bias=_flag(given, family.mlp_bias),
            qk_norm=family.qk_norm,
            windows=_windows(given, family, num_layers),
            dtype=_dtype(given),
            eos_ids=token_ids(given, "eos_token_id"),
            bos_id=next(iter(token_ids(given, "bos_token_id")), None),
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; MinisglError names the file when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MinisglError(f"cannot read {path}: {error.strerror}; a model folder must hold it") from error
    except (ValueError, RecursionError) as error:
        raise MinisglError(f"{path} is not valid JSON ({error}); download the model again") from error
    if not isinstance(value, dict):
        raise MinisglError(f"{path} does not hold a JSON object; download the model again")
    return cast(dict[str, Any], value)


def token_ids(raw: dict[str, Any], key: str) -> tuple[int, ...]:
    """A token-id entry of a config file, which may be absent, one id or a list, as a tuple. ValueError for others."""
    value = raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"{key} is {value!r}; it must be a token id or a list of them")
    return tuple(ids)


def _family(raw: dict[str, Any]) -> Family:
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise MinisglError(f"config.json: architectures is {names!r}; it must be a list of names")
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    found = f"architecture {', '.join(names)} is not supported" if names else "config.json names no architecture"
    raise MinisglError(f"{found}; supported: {', '.join(FAMILIES)}")


def _refuse_unsupported(given: dict[str, Any]) -> None:
    activation = given.get("hidden_act", "silu")
    if activation != "silu":
        raise MinisglError(f"config.json: hidden_act {activation!r} is not supported; supported: 'silu'")
    if "quantization_config" in given:
        method = given["quantization_config"].get("quant_method", "unknown")
        raise MinisglError(
            f"config.json: weights quantized with {method!r} are not supported; use the unquantized checkpoint"
        )


def _size(given: dict[str, Any], key: str, default: int | None = None) -> int:
    value = given.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
        state = "missing" if value is None else f"{value!r}"
        raise MinisglError(f"config.json: {key} is {state}; it must be a positive integer below 2^31")
    return value


def _positive(key: str, value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise MinisglError(f"config.json: {key} is {value!r}; it must be a positive number")
    return number


def _flag(given: dict[str, Any], bias: bool | str) -> bool:
    return bias if isinstance(bias, bool) else bool(given.get(bias, False))


def _dtype(given: dict[str, Any]) -> str:
    name = str(given.get("dtype", given.get("torch_dtype", "bfloat16"))).removeprefix("torch.")
    if name not in DTYPES:
        raise MinisglError(f"config.json: dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _windows(given: dict[str, Any], family: Family, num_layers: int) -> tuple[int, ...]:
    """Sliding windows as transformers applies them: all layers of Mistral, chosen layers of Qwen when switched on."""
    window = _size(given, "sliding_window") if "sliding_window" in given else 0
    if family.windows == "all":
        return (window,) * num_layers
    if family.windows == "none" or not given.get("use_sliding_window", False):
        return (0,) * num_layers
    first = given["max_window_layers"]
    kinds = given.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    known = {"full_attention": 0, "sliding_attention": window}
    if len(kinds) != num_layers or not set(kinds) <= known.keys():
        raise MinisglError(
            f"config.json: layer_types must hold {num_layers} entries (num_hidden_layers), "
            f"each one of {', '.join(known)}"
        )
    return tuple(known[kind] for kind in kinds)


def _rope(given: dict[str, Any]) -> tuple[RopeConfig, int]:
    """The rotary settings, and the context length that YaRN stretches the model to (0 for the other types).

    Qwen's YaRN settings leave max_position_embeddings at the unstretched length, so that alone would be too short.
    """
    entries = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    entries = {key: value for key, value in entries.items() if value is not None}
    kind = entries.get("rope_type", entries.get("type", "default"))
    if kind not in ROPE_TYPES or any(isinstance(value, dict) for value in entries.values()):
        found = f"rope type {kind!r}" if kind not in ROPE_TYPES else "a rope type for each kind of layer"
        raise MinisglError(f"config.json: {found} is not supported; supported: {', '.join(ROPE_TYPES)}")
    rotated = entries.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if rotated != 1:
        raise MinisglError(f"config.json: partial_rotary_factor {rotated} is not supported; it must be 1")

    theta = _positive("rope_theta", entries.get("rope_theta", given.get("rope_theta", 10000.0)))
    if kind == "default":
        return RopeConfig(theta=theta), 0
    max_len = _size(given, "max_position_embeddings")
    stated_len = given.get("original_max_position_embeddings", entries.get("original_max_position_embeddings"))
    original_len = max_len
    if stated_len is not None:
        original_len = int(_positive("original_max_position_embeddings", stated_len))
    if kind == "yarn":
        factor = _positive("factor", entries.get("factor", max_len / original_len))
        rope = RopeConfig(
            kind,
            theta,
            factor,
            original_len,
            beta_fast=float(entries.get("beta_fast") or 32),
            beta_slow=float(entries.get("beta_slow") or 1),
            truncate=bool(entries.get("truncate", True)),
            attention_factor=entries.get("attention_factor"),
            mscale=entries.get("mscale"),
            mscale_all_dim=entries.get("mscale_all_dim"),
        )
        return rope, round(original_len * factor) if stated_len else 0
    if "factor" not in entries:
        raise MinisglError(f"config.json: rope type {kind!r} needs a factor")
    factor = _positive("factor", entries["factor"])
    if kind == "linear":
        return RopeConfig(kind, theta, factor), 0
    low, high = (entries.get(f"{band}_freq_factor") for band in ("low", "high"))
    if low is None or high is None:
        raise MinisglError("config.json: rope type 'llama3' needs low_freq_factor and high_freq_factor")
    return RopeConfig(kind, theta, factor, original_len, low_freq_factor=float(low), high_freq_factor=float(high)), 0
