"""The errors a user can cause. Every message says what was wrong and what to do about it."""


class MinisglError(ValueError):
    """A model, file, option or device that cannot be used as asked; the message names the fix.

    The command line prints the message as one line and exits with 2 (`--debug` shows the traceback).
    """


class RequestError(MinisglError):
    """One request that cannot be served; the others go on. `type` is a stable name that programs may compare."""

    def __init__(self, message: str, type: str = "invalid_request") -> None:
        super().__init__(message)
        self.type = type
