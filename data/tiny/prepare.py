"""The built-in data sets, made of the documentation that comes with Python: no download, a few megabytes.

    python -m data.tiny.prepare

Text: the language reference's topics (pydoc_data.topics), and the docstrings of the standard library, read from its
source files without importing them. SFT: a question about a function, class or module, answered by the first paragraph
of its docstring. DPO: the chosen answer is that one, the rejected answer belongs to a question of another kind. The
texts differ slightly between versions of Python.
"""

import ast
import platform
import random
import sysconfig
import warnings
from pathlib import Path

from data.orca_dpo_pairs.prepare import tokenize as tokenize_pair
from data.slimorca.prepare import tokenize as tokenize_conversation
from data.write import VAL_EVERY, prepare_anew, write_dataset, write_examples
from engine.settings import Parser, UserError, run_script

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
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
    """Return the language reference, one document a topic. Some distributions of Python do not have it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [text.strip() + "\n" for _, text in sorted(topics.items())]


def library_files():
    library = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in library.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(library).parts))


def parse(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in docstrings
        return ast.parse(source)


def docstrings(path):
    """Return the docstrings of a source file as one document, each below the line that defines its object."""
    source = path.read_text(encoding="utf-8", errors="replace")
    lines, parts = source.splitlines(), []
    for node in ast.walk(parse(source)):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and (text := ast.get_docstring(node)):
            title = f"module {path.stem}" if isinstance(node, ast.Module) else lines[node.lineno - 1].strip()
            parts.append(f"{title}\n\n{text}\n")
    return "\n\n".join(parts)


def documents():
    """Return all texts, shuffled in a fixed order, so that every kind of text is among those held out."""
    texts = topics() + [text for path in library_files() if (text := docstrings(path))]
    random.Random(0).shuffle(texts)
    return texts


def summaries(node, name):
    """Yield (question, first paragraph of the docstring on one line) for every documented object in a syntax tree."""
    if text := ast.get_docstring(node):
        yield QUESTIONS[type(node)].format(name), " ".join(text.split("\n\n")[0].split())
    for child in node.body:
        if isinstance(child, DEFINITIONS):
            yield from summaries(child, f"{name}.{child.name}")


def questions():
    """Return [(question, answer), ...] about the standard library, shuffled in a fixed order.

    No answer occurs twice, so none is both in the training and in the validation examples of a stage. It may be in the
    training data of an earlier stage.
    """
    answers = {}
    for path in library_files():
        module = path.parent.name if path.stem == "__init__" else path.stem
        for question, text in summaries(parse(path.read_text(encoding="utf-8", errors="replace")), module):
            if 20 <= len(text) <= 160:
                answers.setdefault(text, question)
    pairs = [(question, text) for text, question in answers.items()]
    random.Random(0).shuffle(pairs)
    return pairs


def preferences(pairs):
    """Yield preference pairs made of (question, answer), ...; every answer is used in one of them only.

    The rejected answer to a question about a function describes a class or module, and the other way round. Even a
    small model can tell such answers apart.
    """
    beginning = FUNCTION.split("{")[0]
    functions = [pair for pair in pairs if pair[0].startswith(beginning)]
    others = [pair for pair in pairs if not pair[0].startswith(beginning)]
    for index, ((function, function_answer), (other, other_answer)) in enumerate(zip(functions, others)):
        about_function = {"question": function, "chosen": function_answer, "rejected": other_answer}
        about_other = {"question": other, "chosen": other_answer, "rejected": function_answer}
        yield {"system": "", **(about_function if index % 2 else about_other)}


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


def prepare_dpo(directory, source="", tokenizer="bytes", block_size=256):
    refuse_source(source)
    rows = list(preferences(questions()))
    write_examples(directory, rows, tokenize_pair, tokenizer, block_size, NAME, len(rows))


def main():
    Parser(__doc__).parse_args()
    home = Path(__file__).parent
    prepare_anew(prepare_text, home)
    prepare_anew(prepare_sft, home / "sft")
    prepare_anew(prepare_dpo, home / "dpo")


if __name__ == "__main__":
    run_script(main)
