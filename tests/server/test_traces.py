"""A span for each request; none without somewhere to send it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel: pip install -e '.[otel]'")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from minisgl.demo import MODEL_PATH
from minisgl.request import SamplingParams
from minisgl.server.answering import Answering
from minisgl.server.engine_client import EngineDied, Generation
from minisgl.server.metrics import Metrics
from minisgl.server.protocol import Tokens
from minisgl.server.traces import TraceParent, Traces, traces_from_environment
from minisgl.tokenizer import Tokenizer

TOKENIZER = Tokenizer(MODEL_PATH)


class Engine:
    """Answers every prompt with two tokens, or with an error."""

    restarts = False

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def generate(self, prompt_ids: list[int], params: SamplingParams, **options: Any) -> Generation:
        owner: Any = SimpleNamespace(abort=lambda id: None)
        generation = Generation(owner, 1)
        generation.put(self.error or Tokens(1, [5, 6], 1, "length"))
        return generation


def spans(*, error: Exception | None = None, leave: bool = False, request_id: str = "r1", headers: Any = None) -> Any:
    """The spans of one request of two prompts with two answers each."""
    exporter, engine = InMemorySpanExporter(), Engine(error)
    traces = Traces("demo", SimpleSpanProcessor(exporter))
    answering = Answering(engine, TOKENIZER, Metrics("demo"), traces=traces)  # type: ignore[arg-type]
    params = SamplingParams(temperature=0.5, max_tokens=2, n=2, stop=("x",))

    async def ask(*scope: Any) -> None:
        answers = answering.answers([[1, 2, 3], [4]], params, request_id=request_id, operation="chat")
        async for _ in answers:
            if leave:
                break
        await answers.aclose()

    async def run() -> None:
        scope: Any = {"type": "http", "headers": headers or []}
        await TraceParent(ask)(scope, None, None)  # type: ignore[arg-type]

    try:
        asyncio.run(run())
    except EngineDied:
        assert error
    return exporter.get_finished_spans()


def test_a_request_has_a_span() -> None:
    [span] = spans()
    assert span.name == "chat demo" and span.kind == SpanKind.SERVER and span.status.status_code == StatusCode.UNSET
    found = dict(span.attributes)
    assert 0 < found.pop("gen_ai.latency.time_to_first_token") <= found.pop("gen_ai.latency.e2e")
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "minisgl",
        "gen_ai.request.model": "demo",
        "gen_ai.response.model": "demo",
        "gen_ai.request.id": "r1",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 2,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stop_sequences": ("x",),
        "gen_ai.usage.input_tokens": 4,  # each prompt once
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ("length",) * 4,
    }
    assert span.resource.attributes["service.name"] == "minisgl"


def test_a_failure_is_in_the_span() -> None:
    [span] = spans(error=EngineDied())
    assert span.status.status_code == StatusCode.ERROR and span.attributes["error.type"] == "EngineDied"
    [span] = spans(leave=True)
    assert span.attributes["error.type"] == "cancelled" and span.attributes["gen_ai.usage.output_tokens"] >= 2


def test_a_span_is_a_child_of_the_callers() -> None:
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    [span] = spans(headers=[(b"traceparent", f"00-{trace_id}-{span_id}-01".encode())])
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace_id, span_id)


def test_no_spans_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert spans(request_id="") == ()  # nobody's request: a check of the server's own
    assert not traces_from_environment("demo", {}).on
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    if pytest.importorskip("opentelemetry.exporter.otlp.proto.http"):
        traces = traces_from_environment("demo", endpoint)
        assert traces.on
        traces.close()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not traces_from_environment("demo", endpoint).on
    assert 'pip install "minisgl[otel]"' in caplog.text
