"""The keys of a body, taken one by one: what nobody took is refused, so that nothing is silently ignored.

Knows keys and JSON types. Does not know what any key means.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from minisgl.errors import RequestError
from minisgl.openai.errors import FieldError
from minisgl.request import SamplingParams

Value = TypeVar("Value")

MAX_QUOTED_CHARS = 80  # errors quote values, and a value can be megabytes
KINDS = {bool: "true or false", int: "an integer", str: "a string", list: "a list", dict: "an object"}


class Fields:
    """The keys of an object that have a value; null means "not given". FieldError names the key that is wrong."""

    def __init__(self, values: Any, place: str = "") -> None:
        if not isinstance(values, Mapping):
            raise RequestError(f"{place or 'the body'} must be a JSON object")
        self._place = place
        self._left = {key: value for key, value in values.items() if value is not None}

    def take(self, name: str, kind: type[Value], default: Value) -> Value:
        """The value of a key, which must be of this JSON type."""
        value = self._left.pop(name, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            self.refuse(name, f"is {quoted(value)}; it must be {KINDS[kind]}")
        return value

    def take_any(self, name: str) -> Any:
        """The value of a key, or None."""
        return self._left.pop(name, None)

    def take_params(self, names: Mapping[str, str], defaults: SamplingParams) -> SamplingParams:
        """The sampling parameters over the defaults. `names`: key in the body -> parameter."""
        taken = {key: self._left.pop(key) for key in names if key in self._left}
        values: dict[str, Any] = {}
        for key, value in taken.items():
            name = names[key]
            if name in values:
                self.refuse(key, f"is another name of {name}: give one of them")
            values[name] = value
        try:
            return defaults.merge(values)
        except RequestError:
            for key, value in taken.items():  # which key it was
                try:
                    SamplingParams(**{names[key]: value})
                except RequestError as error:
                    raise FieldError(str(error), self._place + key, error.type) from None
            raise

    def end(self, labels: Iterable[str] = (), neutral: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        """Refuse every key that is left, but `labels`, which change no answer, and those whose value asks for
        nothing."""
        neutral = neutral or {}
        for name, value in self._left.items():
            if name in labels or any(type(value) is type(none) and value == none for none in neutral.get(name, ())):
                continue
            accepted = " or ".join(quoted(none) for none in neutral.get(name, ()))
            remedy = f"is not supported; the only value is {accepted}" if accepted else "is not supported: leave it out"
            self.refuse(name, remedy)

    def refuse(self, name: str, what: str, type: str = "invalid_parameter") -> NoReturn:
        """FieldError that this key `what`."""
        name = self._place + name
        raise FieldError(f"{name[:MAX_QUOTED_CHARS]} {what}", name[:MAX_QUOTED_CHARS], type)


def quoted(value: Any) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + "..."
