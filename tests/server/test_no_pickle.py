"""Nothing that comes over a socket, or from a file, is unpickled."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
METHODS = {"send_pyobj", "recv_pyobj"}  # zmq's
FILES = [path for folder in ("minisgl", "cli", "bench", "kernels") for path in (ROOT / folder).rglob("*.py")]


def imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize(
    "path", [path for path in FILES if "server" in path.relative_to(ROOT).parts], ids=lambda path: path.name
)
def test_the_server_has_no_way_to_pickle(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not imports(tree) & (PICKLERS | {"multiprocessing"})
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & METHODS


def test_nothing_imports_a_pickler() -> None:
    for path in FILES:
        assert not imports(ast.parse(path.read_text())) & PICKLERS, path
