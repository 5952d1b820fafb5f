"""What a client is told of an error."""

import pytest

from minisgl.errors import RequestError
from minisgl.openai.errors import FieldError
from minisgl.server.http import error_parts


@pytest.mark.parametrize(
    "error, status, type, param, code",
    [
        (FieldError("n is 0", "n"), 400, "invalid_request_error", "n", "invalid_parameter"),
        (RequestError("x", "prompt_too_long"), 400, "invalid_request_error", None, "context_length_exceeded"),
        (RequestError("x", "model_not_found"), 404, "invalid_request_error", None, "model_not_found"),
        (RequestError("NaN", "no_finite_logits"), 500, "server_error", None, "no_finite_logits"),
    ],
)
def test_who_is_to_blame(error: RequestError, status: int, type: str, param: str | None, code: str) -> None:
    told = {"message": str(error), "type": type, "param": param, "code": code}
    assert error_parts(error) == (status, {"error": told}, {})
