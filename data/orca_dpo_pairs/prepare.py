"""Orca DPO pairs, 12,859 questions with a preferred and another answer, or a JSONL file of your own in the same form.

    python -m data.orca_dpo_pairs.prepare
    python -m data.orca_dpo_pairs.prepare --source my.jsonl --out_dir data/mine

A line of it: {"system": "", "question": "...", "chosen": "...", "rejected": "..."}. For a model of another context or
tokenizer, say so (--block_size 256 --tokenizer bytes), or leave it to dpo.py --dataset mine --source my.jsonl.
"""

from pathlib import Path

from data import run_script
from data.chat import render_answer, render_prompt
from data.dataset import SkippedRow, open_rows, prepare_examples, write_examples

HUB_NAME, HUB_REVISION = "Intel/orca_dpo_pairs", "624952e3f420ae18d88b31977ee2ea436c833abb"
FIELDS = ("system", "question", "chosen", "rejected")


def texts(row):
    """The four texts of a row; raises SkippedRow if it has no texts, or lacks one of the last three."""
    try:
        system, question, chosen, rejected = ((row.get(name) or "").strip() for name in FIELDS)
    except (AttributeError, TypeError) as error:
        raise SkippedRow("malformed") from error
    if not (question and chosen and rejected):
        raise SkippedRow("with an empty text")
    return system, question, chosen, rejected


def tokenize(row, encoding, block_size):
    """Two rows of ids and mask, the chosen answer after its prompt and the rejected one; raises SkippedRow unless the
    context has room for an answer, and shows a difference between the two.

    Prompt and answers are tokenized apart, so that both answers follow exactly the same prompt.
    """
    system, question, chosen, rejected = texts(row)
    messages = [("system", system)] * bool(system) + [("user", question)]
    prompt = render_prompt(messages, encoding)
    if len(prompt) >= block_size:
        raise SkippedRow("whose prompt leaves no room")
    chosen, rejected = (prompt + render_answer(text, encoding) for text in (chosen, rejected))
    if chosen[:block_size] == rejected[:block_size]:
        raise SkippedRow("whose answers are the same")
    return [(ids, [0] * len(prompt) + [1] * (len(ids) - len(prompt))) for ids in (chosen, rejected)]


def prepare_dpo(directory, source="", tokenizer="gpt2", block_size=2048):
    """Write the examples into `directory`, from the hub or from the JSONL file `source`."""
    rows, total, name = open_rows(HUB_NAME, HUB_REVISION, source)
    write_examples(directory, rows, tokenize, tokenizer, block_size, name, total)


def main():
    prepare_examples(__doc__, prepare_dpo, Path(__file__).parent, "dpo")


if __name__ == "__main__":
    run_script(main)
