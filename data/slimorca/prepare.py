"""SlimOrca, 518 thousand conversations with answers by GPT-4, or a JSONL file of your own.

    python -m data.slimorca.prepare
    python -m data.slimorca.prepare --source my.jsonl --out_dir data/mine

A line of the file: {"conversations": [{"from": "system", "value": "..."}, {"from": "human", "value": "..."},
{"from": "gpt", "value": "..."}]}, or one of the other forms in data/forms.py. The system turn may be missing, and there
may be any number of other turns. The context and the tokenizer must be the model's: give --block_size and --tokenizer
here, or let sft.py --dataset mine --source my.jsonl prepare the file.
"""

from pathlib import Path

from data.chat import render
from data.forms import CONVERSATIONS, SkippedRow, read_conversation
from data.write import open_rows, prepare_examples, write_examples
from engine.settings import run_script

HUB_NAME, HUB_REVISION = "Open-Orca/SlimOrca", "ce9ed009ef3292bac33d3520afaf5ec804066120"


def tokenize(row, encoding, block_size):
    """Render a row -> [(ids, mask)], up to the end of the last answer. Raises SkippedRow if no answer is in reach."""
    ids, mask = [], []
    for role, text, is_learned in read_conversation(row):
        turn_ids, turn_mask = render([(role, text)], encoding)
        ids += turn_ids
        mask += turn_mask if is_learned else [0] * len(turn_mask)
    if not any(mask):
        raise SkippedRow("without an answer")
    if not any(mask[:block_size]):
        raise SkippedRow("whose answers begin beyond the context")
    end = len(mask) - mask[::-1].index(1)
    return [(ids[:end], mask[:end])]


def prepare_sft(directory, source="", tokenizer="gpt2", block_size=2048):
    """Write the examples to `directory`, from the hub or from the JSONL file `source`."""
    rows, total, name = open_rows(HUB_NAME, HUB_REVISION, source)
    write_examples(directory, rows, tokenize, tokenizer, block_size, name, total, CONVERSATIONS)


def main():
    prepare_examples(__doc__, prepare_sft, Path(__file__).parent, "sft")


if __name__ == "__main__":
    run_script(main)
