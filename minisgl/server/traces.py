"""OpenTelemetry traces: a span for each request, with the attributes of the conventions for generative AI.

    https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/

Latencies have the names that other servers give them (`gen_ai.latency.*`, in seconds). No text of prompts or answers is
in a span. The extra `otel` makes them, and OpenTelemetry's environment variables say where they go:
OTEL_EXPORTER_OTLP_ENDPOINT turns them on. Knows spans. Does not know requests beyond what it is told.
"""

import asyncio
import importlib.util
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minisgl.request import SamplingParams, Usage

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

log = logging.getLogger("minisgl.server")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
PARAMS = {  # of a request that it gives, and what they are called
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
    "stop": "gen_ai.request.stop_sequences",
}


class RequestSpan:
    """What a request's span is told while its answers come; with None for a span, nobody listens."""

    def __init__(self, span: "Span | None", arrival: float) -> None:
        self._span = span
        self._arrival = arrival  # by time.monotonic()
        self._has_token = False
        self._prompts: dict[int, Usage] = {}
        self._num_output = 0
        self._reasons: list[str] = []

    def token(self) -> None:
        """A token came."""
        if self._span and not self._has_token:
            self._has_token = True
            self._span.set_attribute("gen_ai.latency.time_to_first_token", time.monotonic() - self._arrival)

    def answer(self, prompt: int, usage: Usage, reason: str) -> None:
        """One of the answers is whole. `prompt`: the same for all answers to one prompt, whose tokens count once."""
        self._prompts.setdefault(prompt, usage)
        self._num_output += usage.completion_tokens
        self._reasons.append(reason)

    def end(self, error: BaseException | None) -> None:
        if self._span is None:
            return
        prompts = self._prompts.values()
        attributes: dict[str, Any] = {
            "gen_ai.usage.input_tokens": sum(usage.prompt_tokens for usage in prompts),
            "gen_ai.usage.cache_read.input_tokens": sum(usage.cached_tokens for usage in prompts),
            "gen_ai.usage.output_tokens": self._num_output,
            "gen_ai.response.finish_reasons": self._reasons,
            "gen_ai.latency.e2e": time.monotonic() - self._arrival,
        }
        if error:
            from opentelemetry.trace import Status, StatusCode

            gone = isinstance(error, (GeneratorExit, asyncio.CancelledError))  # the client, mostly
            attributes["error.type"] = "cancelled" if gone else type(error).__name__
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.set_attributes(attributes)
        self._span.end()


class Traces:
    """Makes spans; without a processor there are none."""

    def __init__(self, model: str, processor: "SpanProcessor | None" = None) -> None:
        self._model = model
        self._provider = None
        if processor:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider

            service = os.environ.get("OTEL_SERVICE_NAME", "minisgl")
            self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
            self._provider.add_span_processor(processor)
            self._tracer = self._provider.get_tracer("minisgl")

    @property
    def on(self) -> bool:
        return self._provider is not None

    @asynccontextmanager
    async def request(
        self, operation: str, request_id: str, params: SamplingParams, arrival: float
    ) -> AsyncIterator[RequestSpan]:
        """The span of one request, for as long as the block takes. `operation`: chat, text_completion, embeddings."""
        span = self._start(operation, request_id, params) if self._provider and request_id else None
        told, ended_by = RequestSpan(span, arrival), None
        try:
            yield told
        except BaseException as error:
            ended_by = error
            raise
        finally:
            told.end(ended_by)

    def _start(self, operation: str, request_id: str, params: SamplingParams) -> "Span":
        from opentelemetry.trace import SpanKind

        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "minisgl",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": request_id,
        }
        given = {name: getattr(params, field) for field, name in PARAMS.items()}
        attributes |= {name: value for name, value in given.items() if value is not None and value != ()}
        return self._tracer.start_span(f"{operation} {self._model}", kind=SpanKind.SERVER, attributes=attributes)

    def close(self) -> None:
        """Send what has not been sent. Takes as long as it takes; not for the event loop."""
        if self._provider:
            self._provider.shutdown()


def traces_from_environment(model: str, variables: Mapping[str, str] = os.environ) -> Traces:
    """Traces to where the environment says; none when it says nothing, or when the extra is not installed."""
    if not any(variables.get(name) for name in ENDPOINTS):
        return Traces(model)
    try:
        found = all(importlib.util.find_spec(name) for name in NEEDED)
    except ModuleNotFoundError:  # of a parent
        found = False
    if not found:
        log.warning('no traces: %s is set, and needs pip install "minisgl[otel]"', ENDPOINTS[1])
        return Traces(model)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return Traces(model, BatchSpanProcessor(OTLPSpanExporter()))


class TraceParent:
    """ASGI middleware: spans of a request are children of the one that its header `traceparent` names."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        token = context.attach(TraceContextTextMapPropagator().extract(dict(headers)))
        try:
            await self._app(scope, receive, send)
        finally:
            context.detach(token)
