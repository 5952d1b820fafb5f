"""Every setting of the server, with its default, range and help text. The flags of `minisgl serve` are made from it."""

import os
from dataclasses import dataclass

from minisgl.config import check_fields, option
from minisgl.errors import MinisglError

API_KEY_VARIABLE, ADMIN_KEY_VARIABLE = "MINISGL_API_KEY", "MINISGL_ADMIN_KEY"
DEFAULT_PORT = 30000  # SGLang's


@dataclass(frozen=True)
class ServerConfig:
    """How the server listens, whom it answers and how much it takes."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every network: then set a key.")
    port: int = option(DEFAULT_PORT, "Port to listen on; 0 takes a free one.", low=0, high=65535)
    served_model_name: str | None = option(
        None, "Name of the model for clients. [default: the last part of the model's path]"
    )
    api_key: str | None = option(
        None, f"Key for every route but /health. Better in the environment: {API_KEY_VARIABLE}. [default: none]"
    )
    admin_key: str | None = option(
        None,
        f"Key for /metrics, /stats, /flush_cache and /abort_request, instead of the other one ({ADMIN_KEY_VARIABLE}).",
    )
    max_queue: int = option(
        1024, "Most answers that wait beyond --max-running; more requests get 429.", low=0, high=1 << 20
    )
    deadline_s: float | None = option(
        None, "Seconds after which a request ends with an error. [default: none]", low=0.001
    )
    drain_s: float = option(30.0, "Seconds that running requests get to finish after SIGTERM.", low=0)
    restart: str = option(
        "always",
        "What follows when the engine dies: always starts it again, but where torchrun did, the server ends.",
        choices=("always", "never"),
    )
    files_dir: str | None = option(
        None, "Folder for /v1/files and /v1/batches, which go on after a restart. [default: a temporary one]"
    )
    max_file_mb: int = option(200, "Largest file that is uploaded, in MiB.", low=1, high=1 << 14)
    max_files_mb: int = option(8192, "Most that uploaded files may take together, in MiB.", low=1, high=1 << 24)
    max_body_mb: int = option(16, "Largest body of any other request, in MiB.", low=1, high=1024)
    log_format: str = option("text", "Log lines as text or as JSON objects.", choices=("text", "json"))

    def __post_init__(self) -> None:
        check_fields(self, MinisglError)
        for name, variable in (("api_key", API_KEY_VARIABLE), ("admin_key", ADMIN_KEY_VARIABLE)):
            key = getattr(self, name) or os.environ.get(variable)
            if key and not (key.isascii() and key.isprintable()):
                raise MinisglError(
                    f"--{name.replace('_', '-')} must be printable ASCII: HTTP headers hold nothing else"
                )
            object.__setattr__(self, name, key or None)
