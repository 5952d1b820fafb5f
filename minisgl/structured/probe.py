"""Try grammars in a process of its own, which may hang, crash or run out of memory in place of the engine's.

llguidance bounds most of its work, not all: a schema of 100 bytes can keep it busy for minutes, and a chain of some
thousand references overflows its stack. Nothing in a thread stops the one or survives the other.

Run as a script this file is the child, with nothing imported but llguidance. One line of JSON in, one out: first the
arguments of LLTokenizer and LLParserLimits, answered with null; then grammars, answered with [reason or "", Lark].
"""

import json
import select
import subprocess
import sys
import threading
from typing import Any

# Of the child: what passes has room on the engine's threads, of which rayon's are least, at 2 MiB.
STACK_BYTES = 1 << 20
MEMORY_BYTES = 4 << 30  # of addresses
START_TIMEOUT_S = 120.0


class GrammarProbe:
    """One child, started with the first grammar and again after one that killed it. Safe to use from many threads."""

    def __init__(self, tokenizer: dict[str, Any], limits: dict[str, Any], timeout_s: float) -> None:
        self._settings = {"tokenizer": tokenizer, "limits": limits}
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def try_grammar(self, grammar: str) -> tuple[str, str]:
        """(what is wrong with it or "", the grammar in Lark) of one in Lark or GBNF."""
        with self._lock:
            if self._child is None or self._child.poll() is not None:  # it may have been killed while it waited
                self._kill()
                self._start()
            try:
                reason, lark = self._ask(grammar, self._timeout_s)
            except TimeoutError:
                self._kill()
                return f"it was not compiled within {self._timeout_s:g} s; make it simpler", ""
            except EOFError:
                self._kill()
                return "compiling it takes too much memory or nests too deeply; make it simpler", ""
            return reason, lark

    def close(self) -> None:
        with self._lock:
            self._kill()

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent; the child ends with its standard input
        )
        try:
            self._ask(self._settings, START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            self._kill()
            from minisgl.errors import RequestError  # not at the top: the child has no use for the package

            raise RequestError("the process that tries grammars does not start; is memory short?") from error

    def _ask(self, question: Any, timeout_s: float) -> Any:
        assert self._child and self._child.stdin and self._child.stdout
        try:
            print(json.dumps(question), file=self._child.stdin, flush=True)
        except BrokenPipeError:
            raise EOFError from None
        if not select.select([self._child.stdout], [], [], timeout_s)[0]:
            raise TimeoutError
        line = self._child.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def _kill(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.communicate()
        self._child = None


def _answer() -> None:
    """The child: compile each grammar, compute its first mask, and give both up again."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance.gbnf_to_lark import any_to_lark

    settings = json.loads(sys.stdin.readline())
    tokenizer, limits = LLTokenizer(**settings["tokenizer"]), LLParserLimits(**settings["limits"])
    print("null", flush=True)
    for line in sys.stdin:
        reason, lark = "", ""
        try:
            lark = any_to_lark(json.loads(line))
        except Exception as error:  # a plain Exception is what the converter raises; and RecursionError
            reason = f"{type(error).__name__}: {error}"
        if not reason:
            matcher = LLMatcher(tokenizer, lark, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()
            reason = matcher.get_error()
            del matcher
        print(json.dumps([reason, lark]), flush=True)


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=_answer)
    worker.start()
    worker.join()
