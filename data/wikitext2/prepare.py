"""WikiText-2 (raw), 2.4 million tokens of Wikipedia's verified articles, or a text file of your own.

python -m data.wikitext2.prepare
python -m data.wikitext2.prepare --source train.txt --val valid.txt --out_dir data/mine
"""

from pathlib import Path

from data.tokenizer import TOKENIZERS
from data.write import load_from_hub, write_dataset
from engine.settings import Parser, UserError, run_script

HUB_NAME, HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
HUB_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
VAL_SHARE = 0.1  # of the source, for val.bin, if there is no validation text


def split_articles(text):
    """Split a text at title lines, " = Title = ". Section titles have more equals signs and do not split it."""
    articles, lines = [], []
    for line in text.splitlines(keepends=True):
        is_title = line.startswith(" = ") and not line.startswith(" = =") and line.rstrip().endswith(" =")
        if is_title and "".join(lines).strip():
            articles.append("".join(lines))
            lines = []
        lines.append(line)
    return [*articles, "".join(lines)]


def read_text(path):
    """Read a text file. Raises UserError if that fails, or if the file is blank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise UserError(f"{path} has no text in it")
    return text


def prepare_text(directory, source="", val="", tokenizer="gpt2"):
    """Write the data set to `directory`, from the hub or from text files.

    `source` is the text to train on. `val` is the validation text; without it, the end of `source` is held out.
    """
    if Path(source).suffix in (".jsonl", ".parquet"):
        raise UserError(f"{source} is no plain text; python -m data.fineweb_edu.prepare reads such files")
    if not source:
        hub = load_from_hub(HUB_NAME, name=HUB_CONFIG, revision=HUB_REVISION)
        texts = {"train": "".join(hub["train"]["text"]), "val": "".join(hub["validation"]["text"])}
        name = f"{HUB_NAME} {HUB_CONFIG} {HUB_REVISION}"
    elif val:
        texts, name = {"train": read_text(source), "val": read_text(val)}, str(Path(source).resolve())
    else:
        text, name = read_text(source), str(Path(source).resolve())
        start = round(len(text) * (1 - VAL_SHARE))
        start = text.find("\n", start, -1) + 1 or start  # at the end of a line, if there is one
        texts = {"train": text[:start], "val": text[start:]}
    documents = {split: split_articles(text) for split, text in texts.items()}
    write_dataset(directory, documents, tokenizer, name)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--source", default="", help="local text file to train on, instead of the hub")
    parser.add_argument(
        "--val", default="", help="local text file to validate on (default: the last tenth of --source)"
    )
    parser.add_argument("--tokenizer", default="gpt2", choices=TOKENIZERS)
    parser.add_argument("--out_dir", default=Path(__file__).parent, help="where to write (default: beside this file)")
    args = parser.parse_args()
    if args.val and not args.source:
        raise UserError("--val goes with --source")
    prepare_text(args.out_dir, args.source, args.val, args.tokenizer)


if __name__ == "__main__":
    run_script(main)
