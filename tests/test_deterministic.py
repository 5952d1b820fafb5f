"""With `deterministic`, a request's logits are the same bit for bit, whatever runs beside it and however it runs."""

import random
from dataclasses import replace

import pytest
import torch

from minisgl import LLM, SamplingParams
from minisgl.batch import KVCache
from minisgl.kernels.invariant_matmul import invariant_matmul
from minisgl.kernels.rms_norm import rms_norm
from minisgl.kernels.silu_mul import silu_mul
from minisgl.layers.ops import INVARIANT
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from tests.test_graphs import Replayed, use_graphs
from tests.tiny_models import VOCAB_SIZE, make

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
ALONE = {"max_running": 1, "cache": "none", "overlap": False, "page_size": 16}
CROWD = {"max_running": 16, "page_size": 16}


class Recorder:
    """Stands before an engine's sampler, and keeps each row of logits by (the request's seed, place of the token)."""

    def __init__(self, llm: LLM) -> None:
        engine = llm.core.engine
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self._sampler, self._seeds, engine.sampler = engine.sampler, engine.rows.seed, self

    def __call__(self, logits, rows, positions, *tables, **options):
        for row, position, of_row in zip(rows.tolist(), positions.tolist(), logits, strict=True):
            if row >= 0:
                self.logits[int(self._seeds[row]), position] = of_row.clone()
        return self._sampler(logits, rows, positions, *tables, **options)

    def logprobs(self, *arguments):
        return self._sampler.logprobs(*arguments)


def requests(count):
    """(prompts, params): short and long, some behind a common prefix, with features and without; each of its own
    seed."""
    rng = random.Random(0)
    system = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    prompts, params = [], []
    for index in range(count):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((1, 7, 33, 120)))]
        prompts.append(system + own[:50] if index % 3 == 0 else own)
        one = SamplingParams(temperature=1.0, seed=index, max_tokens=rng.choice((3, 14, 25)), ignore_eos=True)
        features = {"repetition_penalty": 1.3, "top_p": 0.8} if index % 4 == 1 else {}
        params.append(replace(one, logprobs=20, prompt_logprobs=1, **features) if index % 2 else one)
    return prompts, params


def run(folder, device, options, count=18, graphs=False):
    """(results, logits by request and place) of some requests that come at once."""
    made = {"device": device, "dtype": DTYPES[device], "deterministic": True, "max_graph_batch": 512 if graphs else 0}
    with LLM(folder, **{"num_pages": 400, **made, **options}) as llm:
        recorder = Recorder(llm) if device == "cpu" or not graphs else None  # a GPU's graph runs no Python
        results = llm.generate(*requests(count))
        if options.get("num_pages"):
            assert llm.core.scheduler.num_preemptions > 0
    return results, recorder and recorder.logits


def assert_same(found, expected):
    (results, logits), (expected_results, expected_logits) = found, expected
    for place, row in expected_logits.items():
        assert logits is None or torch.equal(logits[place], row), f"other bits of {place}"
    for one, other in zip(results, expected_results, strict=True):
        assert one.token_ids == other.token_ids and one.text == other.text
        assert one.logprobs == other.logprobs and one.prompt_logprobs == other.prompt_logprobs


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def alone(folder, device):
    """What each request gets with nothing beside it, its prompt computed at once."""
    return run(folder, device, ALONE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_step_tokens": 32},
        {"max_step_tokens": 64, "cache": "none"},
        {"page_size": 64, "overlap": False},
        {"num_pages": 13, "max_step_tokens": 48},  # requests are preempted
    ],
    ids=str,
)
def test_however_it_runs(folder, device, alone, options):
    assert_same(run(folder, device, {**CROWD, **options}), alone)


def test_captured_steps(folder, device, alone, monkeypatch):
    if device == "cpu":
        use_graphs(monkeypatch, Replayed)
    assert_same(run(folder, device, CROWD, graphs=True), alone)


def test_windows(tmp_path, device):
    folder = make("qwen2-window", tmp_path / "model")
    crowd = run(folder, device, {**CROWD, "max_step_tokens": 50}, count=4)
    assert_same(crowd, run(folder, device, ALONE, count=4))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("width", [100, 1026])
def test_rows_on_a_cpu_do_not_depend_on_threads_shares(num_threads, width):
    """What a thread computes of a batch depends on the batch."""
    weight, bias, x = torch.randn(200, width), torch.randn(200), torch.randn(500, width)
    torch.set_num_threads(num_threads)
    try:
        for op in (
            lambda x: invariant_matmul(x, weight, bias),
            lambda x: rms_norm(x.clone(), weight[0], 1e-6, x * 2),
            silu_mul,
        ):
            together = op(x)
            for rows in (slice(1), slice(7, 40), slice(201, 500)):
                assert torch.equal(op(x[rows].clone()), together[rows])
    finally:
        torch.set_num_threads(1)


def test_all_matmuls_run_before_they_are_needed(folder):
    """In `run_matmuls`, which has their kernels compiled."""
    weights = []

    def note(x, weight, bias):
        weights.append((weight.data_ptr(), len(x)))
        return x @ weight.t()

    ops = INVARIANT._replace(
        linear=note,
        heads=lambda x, weight, bias, *stored: note(x, weight, bias),
        gated=note,
        add_linear=lambda residual, *args: note(*args),
    )
    config = ModelConfig.from_folder(folder)
    model = Decoder(config, device=torch.device("cpu"), dtype=torch.float32, max_len=16, ops=ops)
    model.run_matmuls(17, KVCache(*torch.zeros(2, config.num_layers, 1, 16, config.num_kv_heads, config.head_dim)))
    layer = model.layers[0]
    linears = (layer.attention.qkv, layer.mlp.gate_up, layer.attention.o, layer.mlp.down)
    assert weights == [(weight.data_ptr(), 17) for weight in (*(linear.weight for linear in linears), model.lm_head)]


def test_the_demo_model_answers_as_without(device):
    """And its prompts run in chunks here, its decodes beside them."""
    questions = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in ((2, 3), (30, 4), (17, 25), (8, 8))]
    pool, texts = {"max_running": 3, "max_step_tokens": 67, "num_pages": 20}, []
    for deterministic in (True, False):
        with LLM(device=device, dtype="float32", **pool, deterministic=deterministic) as llm:
            assert llm.config.cascade is not deterministic
            texts.append([one.text for one in llm.chat(questions, SamplingParams(temperature=0, max_tokens=16))])
    assert texts[0] == texts[1]
