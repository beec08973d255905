"""Two tokenizers, both tiktoken encodings: GPT-2's BPE, and plain bytes, which needs no download.

Each has three control tokens after its base vocabulary: <|endoftext|> ends a document, <|im_start|> and <|im_end|>
frame a chat message (ChatML). Text never becomes a control token. This project encodes all text with `encode_ordinary`,
which treats these strings like any others, and inserts control tokens by id.
"""

import functools

import tiktoken

from engine.settings import UserError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOKENIZERS = ("gpt2", "bytes")


def get_tokenizer(name):
    """Return the tiktoken.Encoding called `name`. Raises UserError if it is unknown or cannot be loaded."""
    if name not in TOKENIZERS:
        raise UserError(f"no tokenizer is called {name!r}; there are {' and '.join(TOKENIZERS)}")
    return _gpt2() if name == "gpt2" else _bytes()


@functools.cache
def _bytes():
    ranks = {bytes([value]): value for value in range(256)}  # there are no merges, so every piece is split into bytes
    return _with_control_tokens("bytes", r"[^\n]*\n|[^\n]+", ranks, {END_OF_TEXT: 256})


@functools.cache
def _gpt2():
    try:
        base = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever its download raises
        raise UserError(
            f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder "
            "that holds it, or do without it: --preset tiny, or --tokenizer bytes"
        ) from error
    # GPT-2's pattern makes tiktoken panic at a million blanks in a row. The bound prevents that, and changes nothing up
    # to 65,536 blanks.
    pattern = base._pat_str.replace(r"\s+(?!\S)", r"\s{1,65536}(?!\S)")
    return _with_control_tokens("gpt2", pattern, base._mergeable_ranks, base._special_tokens)


def _with_control_tokens(name, pattern, ranks, special):
    first = len(ranks) + len(special)
    special = {**special, IM_START: first, IM_END: first + 1}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
