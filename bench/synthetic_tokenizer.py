"""A byte-level BPE tokenizer of any size, for models that have a shape and no tokenizer: nothing is downloaded.

    256 bytes, then pairs of a letter of FIRST and one of SECOND, the same behind a space, words of two pairs behind a
    space, and the special tokens at the end

Each of `words` is one token behind a space; any other text becomes smaller ones. Knows the tokenizers library.
"""

from collections.abc import Iterator, Sequence
from itertools import islice, product
from pathlib import Path

from minisgl.tokenizer import has_tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# No letter is in both, so that a word's merges cannot begin at its middle.
FIRST, SECOND = "bcdfghjklmnpqrstvwxz", "aeiouyAEIOUYBCDFGHJK"
PAIRS = [one + other for one, other in product(FIRST, SECOND)]
SPACE = "Ġ"  # as byte-level BPE writes it
SMALLEST = 256 + 2 * len(PAIRS) + len(SPECIAL_TOKENS)
LARGEST = SMALLEST + len(PAIRS) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words(vocab_size: int) -> list[str]:
    """The words that are one token, in the order of their ids."""
    return ["".join(pairs) for pairs in _words(vocab_size)]


def with_tokenizer(folder: Path, target: Path, vocab_size: int) -> Path:
    """The folder of a model with a tokenizer: `target`, with links to the files of a folder that has none and a
    tokenizer of `vocab_size` tokens; else, or where there is none of that size, `folder` itself."""
    if has_tokenizer(folder) or not SMALLEST <= vocab_size <= LARGEST:
        return folder
    for path in folder.iterdir():
        (target / path.name).symlink_to(path.resolve())
    write_tokenizer(target, vocab_size)
    return target


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of `vocab_size` tokens, from SMALLEST to LARGEST."""
    assert SMALLEST <= vocab_size <= LARGEST
    merges = [(pair[0], pair[1]) for pair in PAIRS] + [(SPACE, pair) for pair in PAIRS]
    write_bpe(folder, [*merges, *((SPACE + one, other) for one, other in _words(vocab_size))], CHAT_TEMPLATE)


def write_bpe(folder: Path, merges: Sequence[tuple[str, str]], chat_template: str | None) -> None:
    """Write tokenizer.json and tokenizer_config.json: the bytes, a token for each merge, the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(one + other for one, other in merges)]
    bpe = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def _words(vocab_size: int) -> Iterator[tuple[str, str]]:
    return islice(product(PAIRS, PAIRS), vocab_size - SMALLEST)
