"""WikiText-2 (raw), 2.4 million tokens of Wikipedia's verified articles, or a text file of your own.

python -m data.wikitext2.prepare
python -m data.wikitext2.prepare --source train.txt --val valid.txt --out_dir data/mine
"""

from pathlib import Path

from data import Parser, UserError, run_script
from data.dataset import load_from_hub, write_dataset, write_own_text
from data.tokenizer import TOKENIZERS

HUB_NAME, HUB_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
HUB_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"


def split_articles(text):
    """Cut at the title lines, " = Title = "; section titles have more equals signs. Text without any stays whole."""
    articles, lines = [], []
    for line in text.splitlines(keepends=True):
        is_title = line.startswith(" = ") and not line.startswith(" = =") and line.rstrip().endswith(" =")
        if is_title and "".join(lines).strip():
            articles.append("".join(lines))
            lines = []
        lines.append(line)
    return [*articles, "".join(lines)]


def prepare_text(directory, source="", val="", tokenizer="gpt2"):
    """Write the data set into `directory` from the hub, or from the text files `source` and `val`."""
    if Path(source).suffix in (".jsonl", ".parquet"):
        raise UserError(f"{source} is no plain text; python -m data.fineweb_edu.prepare reads such files")
    if source:
        return write_own_text(directory, source, val, tokenizer, split_articles)
    hub = load_from_hub(HUB_NAME, name=HUB_CONFIG, revision=HUB_REVISION)
    splits = {"train": "train", "val": "validation"}
    documents = {split: split_articles("".join(hub[name]["text"])) for split, name in splits.items()}
    write_dataset(directory, documents, tokenizer, source=f"{HUB_NAME} {HUB_CONFIG} {HUB_REVISION}")


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
