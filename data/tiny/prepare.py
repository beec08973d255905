"""The embedded data sets, made of the documentation that ships inside Python: no download, a few megabytes.

    python -m data.tiny.prepare

Text: the language reference's topics (pydoc_data.topics) and the docstrings of the standard library, read from its
source files without importing them. SFT: a question about a function, class or module, answered by the first paragraph
of its docstring. DPO: that answer is preferred to one that belongs to a question of another kind. Another version of
Python has slightly other texts.
"""

import ast
import platform
import random
import sysconfig
import warnings
from pathlib import Path

from data import Parser, UserError, run_script
from data.dataset import VAL_EVERY, write_dataset, write_examples
from data.orca_dpo_pairs.prepare import tokenize as tokenize_pair
from data.slimorca.prepare import tokenize as tokenize_conversation

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTION = "What does the function {} do?"
QUESTIONS = {
    ast.Module: "What is the module {} for?",
    ast.ClassDef: "What is the class {}?",
    ast.FunctionDef: FUNCTION,
    ast.AsyncFunctionDef: FUNCTION,
}
NAME = f"documentation of Python {platform.python_version()}"


def topics():
    """The language reference, one document a topic; some distributions leave the module out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [text.strip() + "\n" for _, text in sorted(topics.items())]


def library_files():
    library = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in library.rglob("*.py") if not SKIPPED & set(path.relative_to(library).parts))


def parse(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in docstrings
        return ast.parse(source)


def docstrings(path):
    """The docstrings of one source file as a document, each under the line that defines what it describes."""
    source = path.read_text(encoding="utf-8", errors="replace")
    lines, parts = source.splitlines(), []
    for node in ast.walk(parse(source)):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and (text := ast.get_docstring(node)):
            title = f"module {path.stem}" if isinstance(node, ast.Module) else lines[node.lineno - 1].strip()
            parts.append(f"{title}\n\n{text}\n")
    return "\n\n".join(parts)


def documents():
    """All texts in a fixed order, shuffled so that the held-out ones are of every kind."""
    texts = topics() + [text for path in library_files() if (text := docstrings(path))]
    random.Random(0).shuffle(texts)
    return texts


def summaries(node, name):
    """(question, first paragraph of the docstring in one line), ... about everything defined in a syntax tree."""
    if text := ast.get_docstring(node):
        yield QUESTIONS[type(node)].format(name), " ".join(text.split("\n\n")[0].split())
    for child in node.body:
        if isinstance(child, DEFINITIONS):
            yield from summaries(child, f"{name}.{child.name}")


def questions():
    """(question, answer), ... about the standard library, shuffled in a fixed order. No answer occurs twice, so that
    none that one stage holds out is in what that stage learns from; the stages before it may have seen it."""
    answers = {}
    for path in library_files():
        module = path.parent.name if path.stem == "__init__" else path.stem
        for question, text in summaries(parse(path.read_text(encoding="utf-8", errors="replace")), module):
            if 20 <= len(text) <= 160:
                answers.setdefault(text, question)
    pairs = [(question, text) for text, question in answers.items()]
    random.Random(0).shuffle(pairs)
    return pairs


def refuse_source(source):
    if source:
        raise UserError(
            "tiny is made of Python's own documentation; give your data a name: --dataset mine --source FILE"
        )


def prepare_text(directory, source="", tokenizer="bytes"):
    refuse_source(source)
    texts = documents()
    train = [text for index, text in enumerate(texts) if index % VAL_EVERY]
    write_dataset(directory, {"train": train, "val": texts[::VAL_EVERY]}, tokenizer, NAME)


def prepare_sft(directory, source="", tokenizer="bytes", block_size=256):
    refuse_source(source)
    rows = [
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for question, answer in questions()
    ]
    write_examples(directory, rows, tokenize_conversation, tokenizer, block_size, NAME, len(rows))


def preferences():
    """Rows with a right answer, preferred, and a wrong one: to a question about a function the docstring of a class or
    module, and the other way round, which even a small model can tell apart. Every answer is used once."""
    pairs = questions()
    beginning = FUNCTION.split("{")[0]
    functions = [pair for pair in pairs if pair[0].startswith(beginning)]
    others = [pair for pair in pairs if not pair[0].startswith(beginning)]
    for index, ((function, does), (other, is_)) in enumerate(zip(functions, others)):
        about_function = {"question": function, "chosen": does, "rejected": is_}
        about_other = {"question": other, "chosen": is_, "rejected": does}
        yield {"system": "", **(about_function if index % 2 else about_other)}


def prepare_dpo(directory, source="", tokenizer="bytes", block_size=256):
    refuse_source(source)
    rows = list(preferences())
    write_examples(directory, rows, tokenize_pair, tokenizer, block_size, NAME, len(rows))


def main():
    Parser(__doc__).parse_args()
    home = Path(__file__).parent
    prepare_text(home)
    prepare_sft(home / "sft")
    prepare_dpo(home / "dpo")


if __name__ == "__main__":
    run_script(main)
