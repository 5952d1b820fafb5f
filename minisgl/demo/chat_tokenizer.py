"""The demo model's tokenizer: byte-level BPE, digits one by one, and letters one by one in a quoted word.

Knows the chat format twice: as the Jinja template that ships with the model, and as `chat_segments`, the same text cut
where the loss starts and ends (tests hold the two together). Rendering millions of rows with Jinja would take minutes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minisgl.demo.data import Row

VOCAB_SIZE = 1024
SPECIAL_TOKENS = END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
END_OF_TEXT_ID, TURN_START_ID, TURN_END_ID = range(3)  # the trainer numbers the special tokens first

# GPT-2's splitting rules, with two changes that make arithmetic and letters easy for a small model: every digit is a
# token, and so is every letter of a word that is quoted ("planet"). 32 bounds the look-ahead on adversarial input.
SPLIT_PATTERN = r"""\p{L}(?=\p{L}{0,32}")| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"""

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception("role '" + message['role']|string + "' is not one of system, user, assistant") }}
{%- endif %}
{%- if message['content'] is not string %}
{{- raise_exception('message content must be text') }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def train_tokenizer(rows: Iterable[Row]) -> Tokenizer:
    """Byte-level BPE: any Unicode text round-trips, because all 256 bytes are tokens and nothing is normalised."""
    texts = (part for row in rows for message in row for part in (message["role"], message["content"]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def chat_segments(row: Row) -> Iterator[tuple[str, bool]]:
    """(text, is the model's own) pieces of a conversation, in the template's format.

    The pieces are encoded one by one, so an answer's first token never merges with the prompt: at inference it cannot.
    """
    prompt = ""
    for message in row:
        prompt += f"{TURN_START}{message['role']}\n"
        if message["role"] == "assistant":
            yield prompt, False
            yield message["content"] + TURN_END, True
            prompt = "\n"
        else:
            prompt += f"{message['content']}{TURN_END}\n"


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what `AutoTokenizer.from_pretrained` reads, in the form that old and new transformers understand."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
