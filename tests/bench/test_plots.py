"""The roofline is drawn from rows alone."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from minisgl.bench.plots import roofline
from minisgl.errors import MinisglError


def row(op: str, gb_s: float, tflops: float | None) -> dict[str, Any]:
    limits = {"copy_gb_s": 4000.0, "matmul_tflops": 700.0}
    return {"op": op, "gb_s": gb_s, "tflops": tflops, "device": "a card", "ceilings": limits}


@pytest.mark.parametrize(
    "rows", [[row("a", 100, 300.0), row("b", 900, None)], [row("a", 100, 300.0)], [row("b", 900, None)]]
)
def test_a_roofline(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "new" / "roofline.png"
    roofline(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(MinisglError, match="x.docx cannot be drawn"):
        roofline([row("a", 100, 300.0)], tmp_path / "x.docx")
