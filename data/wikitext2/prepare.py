"""WikiText-2 (raw), 2.4 million tokens of Wikipedia's verified articles, or a text file of your own.

python -m data.wikitext2.prepare
python -m data.wikitext2.prepare --source train.txt --val valid.txt --out_dir data/mine
"""

import contextlib
import itertools
import os
import re
import shutil
import tempfile
from pathlib import Path

from data.tokenizer import TOKENIZER_HELP
from data.write import PIECE, load_from_hub, pieces, prepare_anew, stream_utf8, write_dataset
from engine.settings import Parser, UserError, run_script

HUB_NAME, HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
HUB_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
VAL_SHARE = 0.1  # of the source, for val.bin, if there is no validation text


def split_articles(blocks):
    """Split a text, given in blocks, at title lines, " = Title = ". Yields articles, each as an iterable of its lines.

    Section titles have more equals signs and do not split the text.
    """
    number, is_blank = 0, True

    def article(line):
        nonlocal number, is_blank
        is_title = line.startswith(" = ") and not line.startswith(" = =") and line.rstrip().endswith(" =")
        number += is_title and not is_blank
        is_blank = (is_blank or is_title) and not line.strip()
        return number

    for _, lines in itertools.groupby(split_lines(blocks), article):
        yield lines


def split_lines(blocks):
    """Yield the lines of a text that is given in blocks. A line longer than a block comes in several parts."""
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).splitlines(keepends=True) or [""]
        yield from lines
        if len(rest) > PIECE:
            yield rest
            rest = ""
    if rest:
        yield rest


def hold_out(path):
    """Return the byte at which the last tenth of a text file begins.

    If a line ends soon after that place, within a hundredth of the text, it begins there; else at a word's end, if one
    is as near. In a text below 100 kB, near is within 1,000 bytes, but at most a twentieth of the text.
    """
    size = os.path.getsize(path)
    start = round(size * (1 - VAL_SHARE))
    near = min(max(size // 100, min(1000, size // 20)), size - start - 1)
    with open(path, "rb") as file:
        file.seek(start)
        window = file.read(near + 4)
    for end in (rb"\r\n?|\n", rb"\S(?=\s)"):  # of a line, of a word
        if (match := re.search(end, window)) and match.end() <= near:
            return start + match.end()
    return start + re.match(rb"[\x80-\xbf]*\n?", window).end()  # not within a character or a line end


def readable_twice(path, stack):
    """Return the path of a text file with text in it: of a temporary copy for a pipe. Raises UserError for others."""
    if Path(path).is_fifo():
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "pipe.txt"
        with open(path, "rb") as pipe, open(copy, "wb") as file:
            shutil.copyfileobj(pipe, file)
        path = copy
    if not any(block.strip() for block in stream_utf8(path)):
        raise UserError(f"{path} has no text in it")
    return path


def prepare_text(directory, source="", val="", tokenizer="gpt2"):
    """Write the data set to `directory`, from the hub or from text files.

    `source` is the text to train on. `val` is the validation text; without it, the end of `source` is held out.
    """
    corpus_command = f"python -m data.fineweb_edu.prepare --source {source} --out_dir data/NAME"
    if Path(source).suffix in (".jsonl", ".parquet"):
        raise UserError(f"{source} is no plain text; {corpus_command} reads such files")
    if source and Path(source).is_dir():
        raise UserError(f"{source} is a folder; {corpus_command} reads folders")
    with contextlib.ExitStack() as stack:
        name = str(Path(source).resolve())
        if not source:
            hub = load_from_hub(HUB_NAME, name=HUB_CONFIG, revision=HUB_REVISION)
            texts = {"train": hub["train"]["text"], "val": hub["validation"]["text"]}
            name = f"{HUB_NAME} {HUB_CONFIG} {HUB_REVISION}"
        elif val:
            paths = {"train": source, "val": val}
            texts = {split: stream_utf8(readable_twice(path, stack)) for split, path in paths.items()}
        else:
            path = readable_twice(source, stack)
            start = hold_out(path)
            texts = {"train": stream_utf8(path, 0, start), "val": stream_utf8(path, start)}
        documents = {split: map(pieces, split_articles(blocks)) for split, blocks in texts.items()}
        write_dataset(directory, documents, tokenizer, name)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--source", default="", help="local text file to train on, instead of the hub")
    parser.add_argument(
        "--val", default="", help="local text file to validate on (default: the last tenth of --source)"
    )
    parser.add_argument("--tokenizer", default="gpt2", help=TOKENIZER_HELP)
    parser.add_argument("--out_dir", default=Path(__file__).parent, help="where to write (default: beside this file)")
    args = parser.parse_args()
    if args.val and not args.source:
        raise UserError("--val goes with --source")
    options = {"val": args.val} if args.val else {}
    prepare_anew(prepare_text, args.out_dir, args.source, tokenizer=args.tokenizer, **options)


if __name__ == "__main__":
    run_script(main)
