"""The chat shell: what it prints, keeps, saves, and what Ctrl-C stops."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from minisgl.cli import chat as module
from minisgl.cli.chat import RemoteModel, Shell
from minisgl.demo import MODEL_PATH
from minisgl.errors import RequestError
from minisgl.messages import Message
from minisgl.request import Usage

ROOT = Path(__file__).parents[2]

needs_demo_model = pytest.mark.skipif(
    not any(MODEL_PATH.glob("*.safetensors")), reason="needs the demo model's weights"
)


class Echo:
    """Answers with the last message, word by word."""

    def __init__(self) -> None:
        self.usage = Usage(10, 2, 8)
        self.asked: list[list[Message]] = []
        self.closed = 0

    def answer(self, messages: list[Message]) -> Iterator[str]:
        self.asked.append(messages)
        try:
            for word in messages[-1]["content"].split():
                if word == "interrupt":
                    raise KeyboardInterrupt
                if word == "refuse":
                    raise RequestError("the prompt is too long")
                yield word + " "
        finally:
            self.closed += 1


def talk(monkeypatch: pytest.MonkeyPatch, *lines: str) -> tuple[Shell, Echo]:
    left = iter(lines)

    def read(prompt: str) -> str:
        for line in left:
            return line
        raise EOFError

    monkeypatch.setattr(module, "_read_line", read)
    backend = Echo()
    shell = Shell(backend)
    shell.run()
    return shell, backend


def test_turns_follow_one_another(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shell, backend = talk(monkeypatch, "one two", "", "three", "/exit", "never")
    assert capsys.readouterr().out == "one two \nthree \n"
    assert [message["role"] for message in backend.asked[1]] == ["user", "assistant", "user"]
    assert len(backend.asked) == 2
    assert shell.messages[-1] == {"role": "assistant", "content": "three "}


def test_several_lines_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    _, backend = talk(monkeypatch, '"""', "one", "/exit", "two", '"""', '"""three"""')
    assert [asked[-1]["content"] for asked in backend.asked] == ["one\n/exit\ntwo", "three"]


def test_ctrl_c_stops_the_answer_and_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    shell, backend = talk(monkeypatch, "one interrupt two", "three")
    assert [message["content"] for message in shell.messages] == ["one interrupt two", "one ", "three", "three "]
    assert backend.closed == 2


def test_what_cannot_be_answered_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell, _ = talk(monkeypatch, "refuse", "one")
    assert "too long" in capsys.readouterr().err
    assert [message["content"] for message in shell.messages] == ["one", "one "]


def test_a_script_whose_last_question_fails_is_told_by_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    talk(monkeypatch, "refuse", "one")
    with pytest.raises(SystemExit, match="1"):
        talk(monkeypatch, "one", "refuse")


class BreakingServer(BaseHTTPRequestHandler):
    """Its answers end in the middle."""

    def do_GET(self) -> None:
        self._send(b'{"data": [{"id": "m"}]}')

    def do_POST(self) -> None:
        self._send(b'data: {"choices": [{"delta": {"content": "half an"}}]}\n\n')

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body) + (self.command == "POST")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Silence."""


def test_a_server_that_breaks_off_does_not_end_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = HTTPServer(("127.0.0.1", 0), BreakingServer)
    Thread(target=server.serve_forever, daemon=True).start()
    before: list[Message] = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]
    shell = Shell(RemoteModel(f"http://127.0.0.1:{server.server_port}", None, {}, {}), list(before))
    shell.say("two")
    assert "does not answer" in capsys.readouterr().err
    server.shutdown()
    server.server_close()
    shell.say("two")
    assert "does not answer" in capsys.readouterr().err
    assert shell.messages == before


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    shell, _ = talk(
        monkeypatch, "/system be brief", "one", f"/save {path}", f"/save {path}", "/stats", "/reset", "/nonsense"
    )
    assert shell.messages == [{"role": "system", "content": "be brief"}]
    [saved] = path.read_text().splitlines()
    assert [message["role"] for message in json.loads(saved)["messages"]] == ["system", "user", "assistant"]
    err = capsys.readouterr().err
    assert "name another file" in err
    assert "10 tokens, 8 of them cached" in err
    assert "/reset " in err


@needs_demo_model
def test_the_demo_model_talks_and_ctrl_c_does_not_end_it() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    flags = ["--temperature", "0", "--max-tokens", "1900", "--num-pages", "64"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "minisgl"), "chat", *flags],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("What is 2 + 3?\n")
        process.stdin.flush()
        assert process.stdout.readline() == "5\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.stdin.write("What is 3 + 4?\n/stats\n")
        process.stdin.close()
        assert process.stdout.readline() == "7\n"
        assert process.wait(30) == 0
        assert "cached" in process.stderr.read()
