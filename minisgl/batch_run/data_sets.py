"""Hugging Face data sets, streamed from the hub or as `datasets` saved them to a folder.

Knows the package `datasets`, which is imported when a job has such an input. Does not know what a row says.
"""

from pathlib import Path
from typing import Any

from minisgl.batch_run.formats import Rows
from minisgl.errors import MinisglError


def load_hub(name: str, split: str | None) -> Any:
    """`ORG/NAME[:CONFIG]` of the hub, streamed. MinisglError names the splits or configurations that there are."""
    datasets = _import_datasets()
    repository, _, config = name.partition(":")
    try:
        if not config and not (config := datasets.get_dataset_default_config_name(repository)):
            configs = datasets.get_dataset_config_names(repository)
            raise MinisglError(
                f"hf:{name} has several configurations: name one as hf:{repository}:{configs[0]} ({', '.join(configs)})"
            )
        splits = datasets.get_dataset_split_names(repository, config)
        return datasets.load_dataset(repository, config, split=_choose(split, splits, f"hf:{name}"), streaming=True)
    except MinisglError:
        raise
    except Exception as error:  # no such name or configuration, no network, and what the hub's clients raise
        raise MinisglError(f"cannot read hf:{name}: {_first_line(error)}") from error


def load_saved(path: Path, split: str | None) -> Any:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote to a folder, mapped into memory."""
    datasets = _import_datasets()
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged file raises anything
        raise MinisglError(f"{path} cannot be read as a saved data set: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        return saved[_choose(split, list(saved), str(path))]
    if split is not None:
        raise MinisglError(f"{path} has no splits: leave --split out")
    return saved


def read_data_set(data: Any) -> Rows:
    """The rows of a data set. Images and sound stay the bytes that they are: decoded, they have no form in JSON, and
    their text, an address, would be another one in each run."""
    for name, feature in (data.features or {}).items():
        if getattr(feature, "decode", False):
            data = data.cast_column(name, type(feature)(decode=False))
    return enumerate(data)


def count_data_set(data: Any, split: str | None) -> int | None:
    """The rows of a data set, where it knows them."""
    if hasattr(data, "num_rows"):
        return int(data.num_rows)
    known = (data.info.splits or {}).get(split or str(data.split))
    return known.num_examples if known is not None and known.num_examples else None


def _choose(split: str | None, splits: list[str], name: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        asked = "has several splits" if split is None else f"has no split {split!r}"
        raise MinisglError(f"{name} {asked}: name one with --split ({', '.join(splits)})")
    return split


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MinisglError("data sets need the package `datasets`: pip install datasets") from None
    return datasets
