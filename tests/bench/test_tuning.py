"""Tuning with a clock that is given: which tile wins, and what becomes of those that do not work."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from minisgl.bench import attention_decode, attention_prefill, tuning
from minisgl.bench.tuning import Tuning, best_tile, tune, using
from minisgl.errors import MinisglError

CPU = torch.device("cpu")


class Tile(NamedTuple):
    block: int
    num_warps: int


class Kernel:
    """Takes `block` us at the first shape and 1000 / `block` at the second; blocks of 7 are wrong, of 8 too large."""

    def __init__(self) -> None:
        self.table = {"sm_90": {64: Tile(1, 1), 128: Tile(2, 2)}}
        self.before = {name: dict(tiles) for name, tiles in self.table.items()}

    @property
    def block(self) -> int:
        return self.table["sm_90"][64].block

    def launch(self, shape: str) -> Any:
        if self.block == 8:
            raise RuntimeError("out of resource: shared memory\nand more")
        us = float(self.block if shape == "first" else 1000 / self.block)
        return lambda: us

    def tuning(self, *blocks: int) -> Tuning:
        return Tuning(
            op="rms_norm",
            bucket=64,
            table=self.table,
            tiles=[Tile(block, 4) for block in blocks],
            error=lambda: float("nan") if self.block == 7 else 1e-3,
            trials={"first": partial(self.launch, "first"), "second": partial(self.launch, "second")},
            in_graph=False,
        )


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(tuning, "time_us", lambda launch: launch())
    return Kernel()


def test_the_fastest_over_all_shapes_wins(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    # The geometric mean of b and 1000 / b is the same for every b: the first stays, unless a shape is cheaper.
    assert best_tile(kernel.tuning(4, 100), "sm_90") == Tile(4, 4)
    monkeypatch.setattr(tuning, "time_us", lambda launch: launch() ** 2 if launch() > 200 else launch())
    assert best_tile(kernel.tuning(4, 100), "sm_90") == Tile(100, 4)
    assert kernel.table == kernel.before


def test_wrong_and_too_large_tiles_lose(kernel: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    assert best_tile(kernel.tuning(7, 8, 9), "sm_90") == Tile(9, 4)
    said = capsys.readouterr().out
    assert "block 7, num_warps 4: wrong, relative error nan" in said
    assert "block 8, num_warps 4: does not run: out of resource: shared memory\n" in said
    assert best_tile(kernel.tuning(7, 8), "sm_90") is None
    assert kernel.table == kernel.before


def test_an_architecture_without_a_table_gets_one_meanwhile() -> None:
    table: dict[str, dict[int, Tile]] = {}
    with using(table, "sm_99", 64, Tile(1, 1)):
        assert table == {"sm_99": {64: Tile(1, 1)}}
    assert table == {}


@pytest.fixture
def gpu(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """`rms_norm` can be tuned, on an sm_90."""
    module = SimpleNamespace(tunings=lambda device: [kernel.tuning(5, 9)])
    monkeypatch.setattr(tuning, "bench_module", lambda op: module if op == "rms_norm" else SimpleNamespace())
    monkeypatch.setattr(tuning, "open_gpu", lambda device, what: CPU)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    return kernel


def test_tune_writes_and_merges(gpu: Kernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiles.json"
    path.write_text('{"sm_80": {"x": {}}, "sm_90": {"rms_norm": {"128": {"block": 3}}}}')
    tune([], "auto", path)
    assert json.loads(path.read_text()) == {
        "sm_80": {"x": {}},
        "sm_90": {"rms_norm": {"128": {"block": 3}, "64": {"block": 5, "num_warps": 4}}},
    }
    assert '"sm_90": {64: Tile(5, 4)},' in capsys.readouterr().out


def test_a_file_that_cannot_be_written_fails_before_anything_is_measured(
    gpu: Kernel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        tune([], "auto", tmp_path / "file" / "tiles.json")
    assert not capsys.readouterr().out
    tune([], "auto", tmp_path / "new" / "tiles.json")
    assert "sm_90" in json.loads((tmp_path / "new" / "tiles.json").read_text())


def test_what_cannot_be_tuned(gpu: Kernel, tmp_path: Path) -> None:
    with pytest.raises(MinisglError, match="'embedding': known are rms_norm"):
        tune(["embedding"], "auto", tmp_path / "tiles.json")
    for text in ("{", "[]", '{"a": 1}'):
        (tmp_path / "tiles.json").write_text(text)
        with pytest.raises(MinisglError, match="name another file"):
            tune([], "auto", tmp_path / "tiles.json")
        assert (tmp_path / "tiles.json").read_text() == text


DECODE = attention_decode.tunings(CPU, [(2, 100)])
PREFILL = attention_prefill.tunings(CPU, [(2, 70, 30)], attention_prefill.attention_prefill)


@pytest.mark.parametrize(("op", "tunings"), [(attention_decode, DECODE), (attention_prefill, PREFILL)])
def test_the_attention_ops_can_be_tuned(op: Any, tunings: Iterator[Tuning], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the launchers run the reference: what surrounds them is checked, and that an error would be seen."""
    found = list(tunings)
    assert [one.bucket for one in found] == [64, 128, 256]
    for one in found:
        assert one.table is op.TILES and len(set(one.tiles)) == len(one.tiles)
        for make in one.trials.values():
            make()()
    assert found[0].error() < tuning.TOLERANCE
    monkeypatch.setattr(torch.Tensor, "copy_", lambda out, result: out.fill_(1.0))
    assert found[0].error() > 0.1
