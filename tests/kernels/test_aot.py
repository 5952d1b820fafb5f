"""Every kernel compiles for every target, with no GPU; in processes of their own: the interpreter is on in this one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "kernels" / "aot"
TARGETS = ["cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"]
SHARES = 3  # of the ops, which compile for minutes


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, share):
    ops = sorted(case.stem for case in CASES.glob("*.py"))
    # Neighbours together: cases of attention compile the same kernels, which one process finds again.
    ops = ops[len(ops) * share // SHARES : len(ops) * (share + 1) // SHARES]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tests" / "kernels" / "aot_compile.py"), target, *ops]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-4000:]}"
    for op in ops:
        assert f"{target} {op}: " in result.stdout


def test_every_op_has_a_case():
    """A file with a `_kernel` has a case of its name; one with helpers alone is compiled through those that use it."""
    for path in (ROOT / "kernels").glob("*.py"):
        if re.search(r"^def _\w*_kernel\(", path.read_text(), re.MULTILINE):
            assert (CASES / path.name).exists(), f"kernels/{path.name} has no tests/kernels/aot/{path.name}"
