import json

import pytest
from transformers import AutoTokenizer

from minisgl.errors import MinisglError, RequestError
from minisgl.tokenizer import Tokenizer
from tests.tiny_models import EOS_ID, VOCAB_SIZE, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def test_ids_and_back(tokenizer):
    text = "Hello , world ! 😀 日本語 <|im_end|>"
    ids = tokenizer.encode(text)
    assert ids[-1] == EOS_ID == tokenizer.eos_id
    assert tokenizer.decode(ids) == "Hello , world ! 😀 日本語 "  # no clean-up of spaces, no special tokens
    assert tokenizer.vocab_size == VOCAB_SIZE


def test_a_batch_is_its_texts(tokenizer):
    texts = ["the cat", "", "😀", "a" * 3000]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode("") == []


def test_half_a_surrogate_pair_is_the_requests_fault(tokenizer):
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("ok \ud83d")


def test_a_prompt_gets_the_models_special_tokens(tmp_path):
    """A BOS before prompts, but not a second one before what the chat template wrote."""
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    token, bos = "<|endoftext|>", VOCAB_SIZE - 3
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    specials = {token: {"id": token, "ids": [bos], "tokens": [token]}}
    raw["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": specials}
    path.write_text(json.dumps(raw))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a")[0] == bos
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}])[0] != bos


@pytest.mark.parametrize("splits", [False, True])
def test_ids_are_those_of_transformers(tmp_path, splits):
    """Whatever the files say of lengths, which are not the tokenizer's to choose, and of special tokens in a text."""
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    raw["padding"] = {**pad, "pad_to_multiple_of": None}
    path.write_text(json.dumps(raw))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": splits}))
    texts = ["the cat sat on the mat", "a", "behind <|im_end|> it"]
    ids = Tokenizer(tmp_path).encode_batch(texts)
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"]
    assert len(ids[0]) > 4 and len(ids[1]) == 1 and (EOS_ID in ids[2]) != splits


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(messages)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer.encode(expected)
    assert tokenizer.has_chat_template


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        (["hello"], r"messages\[0\] is a str; it must be an object"),
        (
            [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}],
            r"messages\[1\] has role 'robot'; accep",
        ),
        ([{"content": "x"}], r"role None; accepted: system, user, assistant, tool"),
        ([{"role": ["user"], "content": "x"}], r"role \['user'\]; accepted"),
        ([{"role": "user"}], "missing or null; it must be a string or a list"),
        ([{"role": "tool", "content": "x"}], "chat template refused the messages: this model has no tools"),
        ([{"role": "user", "content": "\ud83d"}], "not valid Unicode"),
    ],
)
def test_bad_messages(tokenizer, messages, message):
    with pytest.raises(RequestError, match=message):
        tokenizer.apply_chat_template(messages)


def test_a_template_runs_in_a_sandbox(tmp_path):
    make_tokenizer(tmp_path, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="refused the messages: .*unsafe"):
        Tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])


def test_no_chat_template(tmp_path):
    make_tokenizer(tmp_path, chat_template=None)
    tokenizer = Tokenizer(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.type == "no_chat_template"


@pytest.mark.parametrize(
    "template, says", [(5, "chat_template is no text"), ("{% for %}", "is none: line 1: .* correct it")]
)
def test_a_chat_template_that_is_none(tmp_path, template, says):
    make_tokenizer(tmp_path, chat_template=None)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with pytest.raises(MinisglError, match=says):
        Tokenizer(tmp_path)


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MinisglError, match=r"no tokenizer that transformers can load .*copy tokenizer.json"):
        Tokenizer(tmp_path)


def test_broken_tokenizer(tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(MinisglError, match="no tokenizer that transformers can load"):
        Tokenizer(tmp_path)


def test_special_tokens_are_shown_on_request(tokenizer):
    ids = tokenizer.encode("a <|im_end|>")
    assert tokenizer.decode(ids) == "a "
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a <|im_end|>"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
RICH_TEMPLATE = """{% if tools %}[{{ tools | tojson }}]{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.x }}){% endfor %}</>
{%- endfor %}
{%- if add_generation_prompt %}<assistant>
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}
{%- generation %}{% endgeneration %}"""


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rich")
    make_tokenizer(folder, chat_template=RICH_TEMPLATE)
    return Tokenizer(folder)


USER = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_tools_and_calls_reach_the_template(rich):
    messages = [USER, CALLING, {"role": "tool", "tool_call_id": "1", "content": "8"}]
    text = rich.render(messages, [TOOL])
    assert text == f"[[{json.dumps(TOOL)}]]<user>Hi</><assistant>f(7)</><tool>8</><assistant>"
    assert rich.apply_chat_template(messages, [TOOL]) == rich.encode(text)
    assert rich.render([USER], []) == rich.render([USER], None) == "<user>Hi</><assistant>"


def test_template_kwargs(rich):
    assert rich.render([USER], template_kwargs={"enable_thinking": False}).endswith("<assistant><think></think>")
    assert rich.render([USER], template_kwargs={"enable_thinking": None}).endswith("<assistant>")
    assert rich.render([USER], template_kwargs={"add_generation_prompt": False}) == "<user>Hi</>"
    begun = [USER, {"role": "assistant", "content": "Well"}]
    assert rich.render(begun, template_kwargs={"continue_final_message": True}) == "<user>Hi</><assistant>Well"


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            {"enable_thinkin": True},
            "unknown chat template argument 'enable_thinkin'; this model's template takes: add_gen",
        ),
        ({"messages": []}, "unknown chat template argument 'messages'"),
        ({"chat_template": "x"}, "unknown chat template argument 'chat_template'"),
        ({"thinking": True}, "does not read thinking; it takes: add_generation_prompt, .*, enable_thinking$"),
        ({"enable_thinking": "false"}, "enable_thinking must be true or false, not 'false'"),
        ({"enable_thinking": 0}, "enable_thinking must be true or false, not 0"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        ({"continue_final_message": True}, "needs the assistant's message as the last one, not the user's"),
        (["enable_thinking"], "must be an object"),
    ],
)
def test_bad_template_kwargs(rich, kwargs, message):
    with pytest.raises(RequestError, match=message):
        rich.render([USER], template_kwargs=kwargs)


def test_other_template_kwargs(tmp_path):
    make_tokenizer(tmp_path, chat_template="{{ thinking_budget }} {{ documents | length }} {{ date_string }}")
    tokenizer = Tokenizer(tmp_path)
    kwargs = {"thinking_budget": 7, "documents": [{"title": "a", "text": "b"}], "date_string": "26 Jul 2024"}
    assert tokenizer.render([USER], template_kwargs=kwargs) == "7 1 26 Jul 2024"
    for bad in ({"thinking_budget": True}, {"documents": ["x"]}, {"date_string": 26}):
        with pytest.raises(RequestError, match=f"{next(iter(bad))} must be"):
            tokenizer.render([USER], template_kwargs=bad)


def test_a_template_without_tools_refuses_them(tokenizer):
    with pytest.raises(RequestError, match="no place for tools"):
        tokenizer.render([USER], [TOOL])


def test_a_template_may_want_arguments_as_text(tmp_path):
    """As DeepSeek-R1's does."""
    make_tokenizer(tmp_path, chat_template="{{ '>' + messages[0].tool_calls[0].function.arguments }}")
    assert Tokenizer(tmp_path).render([CALLING]) == '>{"x": 7}'


def test_several_templates(tmp_path):
    make_tokenizer(tmp_path, chat_template={"default": "plain", "tool_use": "{{ tools | length }}"})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.render([USER]) == "plain"
    assert tokenizer.render([USER], [TOOL]) == "1"
    assert "plain" in tokenizer.chat_template and "tools" in tokenizer.chat_template
