"""Where a model is, and its safetensors -> the decoder's parameters, of which a rank reads its slices alone.

Knows checkpoint files and the Hugging Face hub. Does not know families: `Decoder.targets()` says what goes where.
Only safetensors are read: never pickle, never code from the checkpoint.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minisgl.errors import MinisglError
from minisgl.layers import Target
from minisgl.models.config import read_json
from minisgl.models.decoder import Decoder

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
HUB_SKIPPED = ["*/*", "consolidated*"]  # other formats' folders; Mistral's second copy of the weights
COPY_THREADS = 8  # copies wait for the page faults of the mapped files: several wait at once
DUMMY_STD = 0.02  # what most checkpoints were initialised with; activations stay finite through any depth
NAMES_SHOWN = 4


def resolve_model(model: str) -> Path:
    """The folder of a model: a local one, a Hugging Face id (downloaded on first use), or "" for the demo model.

    Raises MinisglError that says what to do when there is no such folder or it cannot be downloaded.
    """
    if not model:
        from minisgl.demo import MODEL_PATH

        return MODEL_PATH
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        raise MinisglError(f"folder {model} has no config.json; name a folder in the Hugging Face layout")
    if folder.exists():
        raise MinisglError(f"{model} is a file; name the folder that holds it")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise MinisglError(
            f"folder {model} does not exist; name an existing folder or a Hugging Face id such as org/name"
        )
    return _download(model)


def load_weights(decoder: Decoder, folder: Path, load_format: str = "auto", seed: int = 0) -> None:
    """Fill the decoder's parameters: "auto" from the folder's safetensors, "dummy" with seeded random numbers, which
    are the same at any number of ranks.

    Raises MinisglError when tensors are missing, unknown or of another shape, before anything is copied.
    """
    if load_format == "dummy":
        _draw_dummy(decoder, seed)
        return
    targets = decoder.targets()
    with ExitStack() as stack:
        sources: dict[str, Any] = {}  # tensor name -> the open file that holds it
        for path in checkpoint_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise MinisglError(f"cannot read {path} ({error}); download the model again") from error
            sources |= dict.fromkeys(file.keys(), file)
        sources = {name: file for name, file in sources.items() if name in targets or not _is_harmless(name, decoder)}
        _check_complete(folder, targets, sources)

        def copy(name: str) -> None:
            _fill(targets[name], sources[name].get_slice(name))  # its slices are views of the mapped file

        # One thread on a CPU: there the copies themselves are parallel.
        with ThreadPoolExecutor(COPY_THREADS if decoder.device.type == "cuda" else 1) as pool:
            list(pool.map(copy, targets))


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the shards its index names, or model.safetensors, or all there are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise MinisglError(f"{index}: weight_map must name a file for each tensor; download the model again")
        shards = [folder / name for name in sorted(set(names.values()))]
        missing = [path.name for path in shards if not path.is_file()]
        if missing or not shards:
            raise MinisglError(f"{folder} lacks shards ({_listed(missing)}) of its index; download the model again")
        return shards
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(kind))
        found = f"only {_listed(others)}" if others else "no weights"
        raise MinisglError(
            f"{folder} has {found}; minisgl reads safetensors: use or convert to a checkpoint that has them"
        )
    return files


def _fill(target: Target, source: Any) -> None:
    """Copy what this rank holds of a tensor, or of a stored one of which slices are read; fill the rest with zeros."""
    if target.cut.num_real < target.cut.size:
        target.parameter.zero_()
    for at, start, length in target.cut.pieces:
        indices = slice(start, start + length)
        piece = source[indices] if target.dim == 0 else source[:, indices]
        into = target.parameter.narrow(target.dim, at, length)
        if piece.dtype != into.dtype:
            piece = piece.to(into.device)  # convert on the device, from the smaller copy over the bus
        into.copy_(piece)


def _check_complete(folder: Path, targets: dict[str, Target], sources: dict[str, Any]) -> None:
    """One MinisglError for everything that does not fit, so that the user need not try again for each."""
    shapes = {name: sources[name].get_slice(name).get_shape() for name in targets if name in sources}
    wrong = [
        f"{name} is {shape}, expected {targets[name].shape}"
        for name, shape in shapes.items()
        if shape != targets[name].shape
    ]
    types = {name: sources[name].get_slice(name).get_dtype() for name in shapes}
    problems = {
        "missing": [name for name in targets if name not in sources],
        "unexpected": [name for name in sources if name not in targets],
        "of the wrong shape": wrong,
        "of a type other than BF16, F16 and F32": [
            f"{name} is {kind}" for name, kind in types.items() if kind not in ("BF16", "F16", "F32")
        ],
    }
    found = [f"{len(names)} {kind} ({_listed(names)})" for kind, names in problems.items() if names]
    if found:
        raise MinisglError(f"the tensors in {folder} do not fit its config.json: {'; '.join(found)}")


def _is_harmless(name: str, decoder: Decoder) -> bool:
    """Tensors of old checkpoints that hold no weights, and the second copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and decoder.config.tie_word_embeddings)


def _draw_dummy(decoder: Decoder, seed: int) -> None:
    generator = torch.Generator(decoder.device).manual_seed(seed)
    for name, target in decoder.targets().items():
        if name.endswith("norm.weight"):
            target.parameter.fill_(1.0)
        elif target.cut.is_whole:
            target.parameter.normal_(0.0, DUMMY_STD, generator=generator)
        else:  # the whole tensor is drawn, and cut: a generator cannot be asked for a slice
            _fill(target, target.parameter.new_empty(target.shape).normal_(0.0, DUMMY_STD, generator=generator))


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    more = [f"{len(shown) - NAMES_SHOWN} more"] if len(shown) > NAMES_SHOWN else []
    return ", ".join(shown[:NAMES_SHOWN] + more)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED))
    except GatedRepoError as error:
        reason = f"it is gated: accept its licence at https://huggingface.co/{model}, then run `hf auth login`"
        raise MinisglError(f"cannot download {model}: {reason}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "there is no such folder here nor model on huggingface.co (a private one needs `hf auth login`)"
        raise MinisglError(f"cannot find {model}: {reason}") from error
    except Exception as error:  # offline and not in the cache, disk full, and what the hub's HTTP clients raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise MinisglError(
            f"cannot download {model} ({first_line}); check the network and the disk, or name a local folder"
        ) from error
