"""Tiny checkpoints, made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model(name) -> folder of that checkpoint; do not write to it."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = make(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder_of
