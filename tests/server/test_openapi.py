"""No body that the OpenAPI document allows, and none that it forbids, makes the server fail."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install schemathesis")
LENGTHS = {"/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/responses": "max_output_tokens"}
OTHERS = ("/v1/embeddings", "/v1/batches", "/generate", "/tokenize", "/detokenize", "/abort_request")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", [*LENGTHS, *OTHERS])
def test_nothing_is_a_server_error(server: Any, path: str, mode: Any) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = document[path]["POST"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and path in LENGTHS:  # no test waits for thousands of tokens
            for name in ("max_completion_tokens", "min_tokens", "n"):
                case.body.pop(name, None)
            case.body[LENGTHS[path]] = 1
        response = case.call(timeout=60)
        assert response.status_code < 500, response.text

    check()
