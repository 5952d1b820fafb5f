"""OpenAI's error object.

https://platform.openai.com/docs/guides/error-codes
"""

from typing import Any

from minisgl.errors import RequestError

CODES = {"prompt_too_long": "context_length_exceeded"}  # what clients compare with; our other types are the codes
MODEL_FAULTS = ("no_finite_logits",)  # types of errors that the request is not to blame for


class FieldError(RequestError):
    """A key of a body that is wrong; `param` is its name."""

    def __init__(self, message: str, param: str, type: str = "invalid_parameter") -> None:
        super().__init__(message, type)
        self.param = param


def error_object(
    message: str, type: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """{"error": ...}, the body of every answer that is none."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def request_error_object(error: RequestError) -> dict[str, Any]:
    """The error object of a request that cannot be answered."""
    type = "server_error" if error.type in MODEL_FAULTS else "invalid_request_error"
    return error_object(str(error), type, getattr(error, "param", None), CODES.get(error.type, error.type))
