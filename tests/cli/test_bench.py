"""`minisgl bench`: what its help promises, and what the commands call."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.conftest import Invoke

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
DEFAULTS = {"model": "qwen3-0.6b", "repeats": 3, "warmups": 1, "json_path": None, "baseline": None}


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> Calls:
    """Put a module in the place of minisgl.bench.`name` whose functions note their calls."""
    calls: Calls = []

    def noting(result: Any) -> Any:
        return lambda *args, **options: calls.append((args, options)) or result

    module = SimpleNamespace(**{name: noting(result) for name, result in {"ratio": 1.0, **functions}.items()})
    monkeypatch.setitem(sys.modules, f"minisgl.bench.{name}", module)
    return calls


def test_throughput(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"engine": "minisgl"}, {"engine": "transformers"}]
    calls = stand_in(monkeypatch, "throughput", run=rows, table="12 tokens/s", ratio=2.5)
    done = invoke("bench", "throughput")
    assert done.exit_code == 0, done.output
    assert calls[0] == ((), {**DEFAULTS, "workload": "mini", "profile_dir": None})
    assert done.stdout == "12 tokens/s\n12 tokens/s\nminisgl is 2.50 times as fast as transformers\n"


def test_throughput_with_flags(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = stand_in(monkeypatch, "throughput", run=[{"engine": "minisgl"}], table="12 tokens/s")
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "kernels.txt").write_text("mm 99%")
    flags = "--workload p.jsonl -m demo --repeats 5 --warmups 0 --json x.jsonl --baseline transformers --profile trace"
    done = invoke("bench", "throughput", *flags.split(), "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert calls[0][1] == {
        "workload": "p.jsonl",
        "model": "demo",
        "repeats": 5,
        "warmups": 0,
        "json_path": Path("x.jsonl"),
        "baseline": "transformers",
        "profile_dir": Path("trace"),
        "dtype": "float32",
    }
    assert "mm 99%" in done.stdout and "trace/trace.json" in done.stdout


def test_latency(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "latency", run=[{"engine": "minisgl"}], table="TTFT 3")
    assert invoke("bench", "latency").stdout == "TTFT 3\n"
    assert calls[0] == ((), {**DEFAULTS, "batch": 1, "input_len": 128, "output_len": 128})
    invoke("bench", "latency", "--batch", "8", "--input-len", "9", "--output-len", "7", "--no-overlap")
    assert calls[2] == ((), {**DEFAULTS, "batch": 8, "input_len": 9, "output_len": 7, "overlap": False})


def test_start(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "start", run=[{}, {}], table="ready_s 3")
    assert invoke("bench", "start", "--repeats", "2", "--device", "cpu").stdout == "ready_s 3\nready_s 3\n"
    assert calls[0] == ((), {"model": "qwen3-0.6b", "repeats": 2, "json_path": None, "device": "cpu"})


def test_eval(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"engine": name} for name in ("minisgl", "minisgl --cache none", "lm-eval hf")]
    calls = stand_in(monkeypatch, "evaluate", run=rows, table="rows/s 3", ratio=5.0)
    lines = invoke("bench", "eval", "--rows", "8", "--baseline", "lm-eval", "--tp", "2").stdout.splitlines()
    assert lines[2] == "minisgl is 5.00 times as fast as minisgl --cache none"
    assert lines[4] == "minisgl is 5.00 times as fast as lm-eval hf"
    flags = {"rows": 8, "context": 1024, "baseline": "lm-eval", "hf_batch": 16, "tp": 2}
    assert calls[0] == ((), {**DEFAULTS, **flags})


def test_perplexity(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "perplexity", run=[{}], table="scored 3 MB")
    assert invoke("bench", "perplexity", "--layers", "2").stdout == "scored 3 MB\n"
    assert calls[0] == ((), {"model": "qwen3-0.6b", "tokens": 8192, "layers": 2, "json_path": None})


def test_features(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "features", run=[{}, {}], table="+1%")
    assert invoke("bench", "features", "--batch", "8", "--page-size", "16").stdout == "+1%\n+1%\n"
    expected = {name: value for name, value in DEFAULTS.items() if name != "baseline"}
    assert calls[0] == ((), {**expected, "batch": 8, "input_len": 128, "output_len": 128, "page_size": 16})


def test_batch_run(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "batch_run", run=[{}, {}], table="overhead 1%")
    assert invoke("bench", "batch_run", "-m", "demo", "--device", "cpu").stdout == "overhead 1%\noverhead 1%\n"
    expected = {name: value for name, value in DEFAULTS.items() if name != "baseline"}
    assert calls[0] == ((), {**expected, "workload": "mini", "model": "demo", "device": "cpu"})


def test_serve(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "serve", run=[{}, {}], table="TTFT 3")
    done = invoke("bench", "serve")
    assert done.stdout.startswith("TTFT 3\nTTFT 3\n") and "TPOT             time per output token =" in done.stdout
    paths = {"offline_path": None, "json_path": None, "plot_path": None}
    about = {"url": "http://127.0.0.1:30000", "workload": "mini", "seed": 0, "max_concurrency": None, "goodput": None}
    assert calls[0] == ((), {**about, **paths, "request_rates": [float("inf")], "warmups": 1})
    flags = "--workload 512x128 --request-rate 8,0.5,inf --max-concurrency 4 --goodput ttft:200,itl:20 --plot x.png"
    invoke(
        "bench",
        "serve",
        "--url",
        "http://host:1",
        *flags.split(),
        "--offline",
        "rows.jsonl",
        "--seed",
        "3",
        "--warmups",
        "0",
    )
    assert calls[3][1] == {
        "url": "http://host:1",
        "workload": "512x128",
        "request_rates": [8.0, 0.5, float("inf")],
        "max_concurrency": 4,
        "goodput": {"ttft": 200.0, "itl": 20.0},
        "seed": 3,
        "warmups": 0,
        "offline_path": Path("rows.jsonl"),
        "json_path": None,
        "plot_path": Path("x.png"),
    }


@pytest.mark.parametrize(
    "flag",
    [
        "--request-rate 0",
        "--request-rate 1,x",
        "--request-rate nan",
        "--goodput ttft",
        "--goodput ttft:0",
        "--goodput speed:3",
        "--max-concurrency 0",
    ],
)
def test_flags_of_serve_out_of_range(flag: str, invoke: Invoke) -> None:
    done = invoke("bench", "serve", *flag.split())
    assert done.exit_code == 2 and "must be" in done.output or "is not in the range" in done.output


def test_kernels(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "kernels", run=None)
    assert invoke("bench", "kernels", "rms_norm", "--device", "cpu", "--plot", "x.png").exit_code == 0
    assert invoke("bench", "kernels").exit_code == 0
    assert calls == [
        ((["rms_norm"], "cpu"), {"json_path": None, "plot_path": Path("x.png")}),
        (([], "auto"), {"json_path": None, "plot_path": None}),
    ]


def test_tune(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "tuning", tune=None)
    assert invoke("bench", "kernels", "attention_decode", "--tune", "tiles.json").exit_code == 0
    assert calls == [((["attention_decode"], "auto", Path("tiles.json")), {})]


def test_report(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "report", write_report=[Path("bench/README.md")])
    assert invoke("bench", "report").stdout == "bench/README.md\n"


def test_help_has_the_formula_of_each_figure(invoke: Invoke) -> None:
    throughput, latency, serve, features, kernels, batch_run, start = (
        invoke("bench", name, "--help").output
        for name in ("throughput", "latency", "serve", "features", "kernels", "batch_run", "start")
    )
    assert "tokens/s of plain requests / tokens/s of these - 1" in features
    assert "overhead  median of job / median of generate - 1" in batch_run
    for figure in ("output tokens/s  output tokens / seconds", "seconds          from", "ready_s          seconds"):
        assert figure in throughput
    for figure in ("TTFT  time to first", "ITL   inter-token", "E2E   end to end"):
        assert figure in latency
    for figure in (
        "TTFT  ",
        "ITL  ",
        "TPOT  ",
        "E2E  ",
        "goodput  ",
        "of offline  ",
        "output tokens/s  output tokens /",
    ):
        assert f"\n    {figure}" in serve or f"\n  {figure}" in serve
    for figure in ("ready_s   the engine is there", "answer_s  it has answered", "compiled  kernels"):
        assert figure in start
    for figure in ("graph us     median", "GB/s         bytes", "of ceiling   the larger"):
        assert figure in kernels


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["throughput", "--workload", "nonsense"], "workload is 'nonsense'; it must be one of mini"),
        (["throughput", "-m", "non/sense/"], "folder non/sense/ does not exist"),
        (["serve", "--url", "host:1"], "--url is 'host:1'; it must begin"),
        (["serve", "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
        (["kernels", "--device", "cpu"], "bench kernels needs a GPU"),
        (["kernels", "--device", "cpu", "--tune", "tiles.json"], "--tune needs a GPU"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], reason: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "minisgl.llm")  # the real one
    done = invoke("bench", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {reason}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["throughput", "latency"])
@pytest.mark.parametrize("flag", [("--repeats", "0"), ("--warmups", "-1"), ("--baseline", "vllm")], ids=" ".join)
def test_flags_out_of_range(command: str, flag: tuple[str, str], invoke: Invoke) -> None:
    assert invoke("bench", command, *flag).exit_code == 2
