"""Orca DPO pairs, 12,859 questions with a chosen and a rejected answer, or a JSONL file of your own.

    python -m data.orca_dpo_pairs.prepare
    python -m data.orca_dpo_pairs.prepare --source my.jsonl --out_dir data/mine

A line of the file: {"system": "", "question": "...", "chosen": "...", "rejected": "..."}, or one of the other forms
in data/forms.py. The context and the tokenizer must be the model's: give --block_size and --tokenizer here, or let
dpo.py --dataset mine --source my.jsonl prepare the file.
"""

from pathlib import Path

from data.chat import render_answer, render_prompt
from data.forms import PREFERENCES, SkippedRow, read_preference
from data.write import open_rows, prepare_examples, write_examples
from engine.settings import run_script

HUB_NAME, HUB_REVISION = "Intel/orca_dpo_pairs", "624952e3f420ae18d88b31977ee2ea436c833abb"


def tokenize(row, encoding, block_size):
    """Render a row -> [(ids, mask), (ids, mask)]: the prompt with the chosen answer, then with the rejected one.

    Prompt and answers are tokenized separately, so that both answers follow the same prompt ids. Raises SkippedRow if
    the prompt fills the context, or if the two answers are the same as far as the context reaches.
    """
    messages, chosen, rejected = read_preference(row)
    prompt = render_prompt(messages, encoding)
    if len(prompt) >= block_size:
        raise SkippedRow("whose prompt leaves no room")
    chosen, rejected = (prompt + render_answer(text, encoding) for text in (chosen, rejected))
    if chosen[:block_size] == rejected[:block_size]:
        raise SkippedRow("whose answers are the same")
    return [(ids, [0] * len(prompt) + [1] * (len(ids) - len(prompt))) for ids in (chosen, rejected)]


def prepare_dpo(directory, source="", tokenizer="gpt2", block_size=2048):
    """Write the examples to `directory`, from the hub or from the JSONL file `source`."""
    rows, total, name = open_rows(HUB_NAME, HUB_REVISION, source)
    write_examples(directory, rows, tokenize, tokenizer, block_size, name, total, PREFERENCES)


def main():
    prepare_examples(__doc__, prepare_dpo, Path(__file__).parent, "dpo")


if __name__ == "__main__":
    run_script(main)
