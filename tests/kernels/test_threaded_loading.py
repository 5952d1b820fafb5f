import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from triton.runtime import build

from minisgl.kernels.threaded_loading import allow_threaded_loading

THREADS = 8
INCLUDE = Path(sysconfig.get_paths()["include"])
LOADS = 2_000  # of each thread; without the lock, some ten of all of them find another's function
EXTENSION = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(NUMBER); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "__launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___launcher(void) { return PyModule_Create(&module); }
"""


@pytest.fixture
def extensions(tmp_path):
    """One path a thread: extensions of one name, as Triton's launchers are, each with a function of its own."""
    paths = []
    for number in range(THREADS):
        path = tmp_path / str(number) / "__launcher.so"
        path.parent.mkdir()
        source = path.with_suffix(".c")
        source.write_text(EXTENSION)
        command = ["cc", "-shared", "-fPIC", f"-I{INCLUDE}", f"-DNUMBER={number}", str(source), "-o", str(path)]
        subprocess.run(command, check=True)
        paths.append(str(path))
    return paths


@pytest.mark.skipif(not (shutil.which("cc") and (INCLUDE / "Python.h").exists()), reason="needs cc and Python.h")
def test_threads_find_what_they_loaded(extensions):
    allow_threaded_loading()

    def others(number):
        loads = (build._load_module_from_path("__launcher", extensions[number]) for _ in range(LOADS))
        return sum(module.launch() != number for module in loads)

    with ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(others, range(THREADS))) == 0


def test_it_is_done_once():
    allow_threaded_loading()
    load = build._load_module_from_path
    allow_threaded_loading()
    assert build._load_module_from_path is load


def test_a_triton_that_loads_otherwise_is_left_alone(monkeypatch):
    allow_threaded_loading.cache_clear()
    with monkeypatch.context() as patch:
        patch.delattr(build, "_load_module_from_path")
        allow_threaded_loading()
        assert not hasattr(build, "_load_module_from_path")
    allow_threaded_loading.cache_clear()
