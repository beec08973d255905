"""Three tokenizers: GPT-2's BPE, plain bytes, which need no download, and the tokenizer.json of a Hugging Face model.

Each has three control tokens: <|endoftext|> ends a document, <|im_start|> and <|im_end|> frame a chat message (ChatML).
Those that a vocabulary lacks take the ids after it. Text never becomes a control token. This project encodes all text
with `encode_ordinary`, which treats these strings like any others, and inserts control tokens by id.
"""

import functools
import hashlib
import json
import re
from pathlib import Path

import tiktoken

from engine.files import atomic_write
from engine.settings import UserError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LLAMA3_END_OF_TEXT = "<|end_of_text|>"  # has the part of <|endoftext|> in a vocabulary without that
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
TOKENIZERS = ("gpt2", "bytes")
TOKENIZER_HELP = "gpt2, bytes, or a model's tokenizer.json (default: gpt2)"


def get_tokenizer(name, folder=""):
    """Return the tokenizer called `name`: gpt2, bytes, or a file in `folder` such as tokenizer-1a2b3c4d.json.

    It has the attributes and methods of a tiktoken.Encoding that this project uses, source, which get_tokenizer() takes
    as a name, and save(folder). Raises UserError if it is unknown, damaged or cannot be loaded.
    """
    if name in TOKENIZERS:
        return _gpt2() if name == "gpt2" else _bytes()
    if not str(name).endswith(".json"):
        raise UserError(f"no tokenizer is called {name!r}; there are {' and '.join(TOKENIZERS)}, or a tokenizer.json")
    path = Path(folder, name).absolute()
    return _from_file(str(path), path.stat().st_mtime_ns if path.exists() else 0)


class Encoding(tiktoken.Encoding):
    """A tiktoken.Encoding with the rest of the interface of FileTokenizer."""

    @property
    def source(self):
        return self.name

    def save(self, folder):
        """Save nothing: the name is enough to find it again."""

    def tokenizer_json(self):
        """Return the contents of a tokenizer.json with the same ids."""
        ranks, merges = self._mergeable_ranks, []
        spelled = {token: "".join(BYTE_CHARACTERS[value] for value in token) for token in ranks}
        for token in sorted(ranks, key=ranks.get):
            parts = [token[i : i + 1] for i in range(len(token))]
            while len(parts) > 2:  # merge as an encoder does, up to the last merge, which made this token
                pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
                i = pairs.index(min(pairs))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                merges.append([spelled[part] for part in parts])
        model = {"type": "BPE", "vocab": {spelled[token]: rank for token, rank in ranks.items()}, "merges": merges}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        control = {name: self.encode_single_token(name) for name in CONTROL_TOKENS}
        described = dict(version="1.0", added_tokens=[], pre_tokenizer=byte_level, decoder=byte_level, model=model)
        return with_control_tokens(described, control)


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
    return Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# ---------------------------------------------------------------------------------------------------
# tokenizer.json

# The character that stands for each byte in a byte-level vocabulary, as GPT-2's authors chose it
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [value for value in range(256) if value not in _PRINTABLE]
BYTE_CHARACTERS = {value: chr(value) for value in _PRINTABLE} | {value: chr(256 + i) for i, value in enumerate(_OTHERS)}


def with_control_tokens(described, control):
    """Add control tokens {name: id} to the contents of a tokenizer.json, and mark all as special.

    Then the tokenizers library never finds one in a text if encode_special_tokens is set.
    """
    added = {token["id"]: token for token in described["added_tokens"]}
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    for name, index in control.items():
        added[index] = {"id": index, "content": name, **plain, **added.get(index, {}), "special": True}
    return {**described, "added_tokens": list(added.values())}


def check_byte_level(described):
    """Raise ValueError unless the contents of a tokenizer.json are a byte-level BPE.

    Others would encode a message by itself otherwise than within its frame, or cannot be decoded token by token.
    """
    parts = [described["model"], described["pre_tokenizer"], described["decoder"]]
    model, pre_tokenizer, decoder = (
        [part["type"] for part in [whole, *whole.get("pretokenizers", ())]] for whole in parts
    )
    if model != ["BPE"] or "ByteLevel" not in pre_tokenizer or decoder != ["ByteLevel"]:
        raise ValueError(f"it has a {model[0]}, split by {pre_tokenizer[-1]} and joined by {decoder[0]}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if parts[0].get(name):
            raise ValueError(f"it has a {name}")
    if '"add_prefix_space": true' in json.dumps(parts[1]):
        raise ValueError("it has add_prefix_space")
    if "Split" not in pre_tokenizer and '"use_regex": false' in json.dumps(parts[1]):
        raise ValueError("it does not split a text into words")
    normalizer = described.get("normalizer") or {"type": "NFC"}  # which changes no blanks
    if normalizer["type"] != "NFC":
        raise ValueError(f"it has the normalizer {normalizer['type']}")


@functools.cache
def _from_file(path, changed):
    return FileTokenizer(path)


class FileTokenizer:
    """A byte-level BPE from the tokenizer.json of a Hugging Face model.

    Its name has the file's checksum in it, so data and checkpoints with the same name have the same tokenizer. Raises
    UserError if the file cannot be used.
    """

    def __init__(self, path):
        self.source = path
        has_checksum = re.fullmatch(r"tokenizer-[0-9a-f]{8}\.json", Path(path).name)
        try:
            self.contents = Path(path).read_bytes()
            described = json.loads(self.contents)
            check_byte_level(described)
            added = {token["content"]: token["id"] for token in described["added_tokens"]}
            ids = described["model"]["vocab"] | added
            if sorted(ids.values()) != list(range(len(ids))) or not ids:
                raise ValueError("its ids have gaps, or stand for two tokens")
            byte_of = {character: value for value, character in BYTE_CHARACTERS.items()}
            self.bytes_of = {
                index: name.encode() if name in added else bytes(byte_of[character] for character in name)
                for name, index in ids.items()
            }
        except OSError as error:
            hint = "; it belongs beside the checkpoint or the data that name it" if has_checksum else ""
            raise UserError(f"cannot read {path}: {error.strerror}{hint}") from error
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not the tokenizer.json of a byte-level BPE ({error})") from error
        digest = hashlib.sha256(self.contents).hexdigest()[:8]
        self.name = f"tokenizer-{digest}.json"
        if has_checksum and Path(path).name != self.name:
            raise UserError(f"{path} is damaged: its checksum is {digest}")
        self.control = {name: ids[name] for name in CONTROL_TOKENS if name in ids}
        if LLAMA3_END_OF_TEXT in ids:
            self.control.setdefault(END_OF_TEXT, ids[LLAMA3_END_OF_TEXT])
        try:
            from tokenizers import Tokenizer  # here, because only models from elsewhere need it
        except ImportError as error:
            raise UserError("a model from elsewhere needs two packages: pip install safetensors tokenizers") from error
        try:
            self.tokenizer = Tokenizer.from_str(json.dumps(with_control_tokens(described, self.control)))
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{path} is damaged: {error}") from error
        if self.tokenizer.get_vocab() != ids:  # the library numbers added tokens itself
            raise UserError(f"{path} has added tokens whose ids are not in the order of the file")
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.control_ids = {*self.control.values()}
        self.n_base = self.n_vocab = len(self.bytes_of)
        for name in CONTROL_TOKENS:
            if name not in self.control:
                self.control[name], self.bytes_of[self.n_vocab] = self.n_vocab, name.encode()
                self.n_vocab += 1
        for name in CONTROL_TOKENS:
            self.encode_ordinary(name)  # which raises a UserError where merges make a control token

    def encode_ordinary(self, text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates, as tiktoken does
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            raise UserError(f"{self.source} makes a control token of a text")
        return ids

    def encode_single_token(self, name):
        return self.control[name]

    def decode_single_token_bytes(self, token):
        return self.bytes_of[token]

    def decode(self, ids, errors="replace"):
        return b"".join(map(self.decode_single_token_bytes, ids)).decode("utf-8", errors)

    def tokenizer_json(self):
        """Return the contents of a tokenizer.json with the same ids: the file's, and the new control tokens.

        What the file puts around a text, such as a token for its beginning, is left out, as in encode_ordinary().
        """
        return with_control_tokens(json.loads(self.contents), self.control) | {"post_processor": None}

    def save(self, folder):
        """Write the file to `folder`, under its name, unless it is there and whole."""
        path = Path(folder) / self.name
        if not path.exists() or path.read_bytes() != self.contents:
            with atomic_write(path) as temporary:
                temporary.write_bytes(self.contents)
