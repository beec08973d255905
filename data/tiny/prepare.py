"""The embedded data set: the documentation that ships inside Python, a few megabytes of English and code.

    python -m data.tiny.prepare

It needs no download: the language reference's topics (pydoc_data.topics) and the docstrings of the standard library,
read from its source files without importing them. Another Python version has slightly other texts.
"""

import ast
import platform
import random
import sysconfig
import warnings
from pathlib import Path

from data import Parser, UserError, run_script
from data.dataset import write_dataset

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
VAL_EVERY = 20  # every 20th document is held out


def topics():
    """The language reference, one document a topic; some distributions leave the module out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [text.strip() + "\n" for _, text in sorted(topics.items())]


def docstrings(path):
    """The docstrings of one source file as a document, each under the line that defines what it describes."""
    source = path.read_text(encoding="utf-8", errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escape sequences in docstrings
        tree = ast.parse(source)
    lines, parts = source.splitlines(), []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if text := ast.get_docstring(node):
            title = f"module {path.stem}" if isinstance(node, ast.Module) else lines[node.lineno - 1].strip()
            parts.append(f"{title}\n\n{text}\n")
    return "\n\n".join(parts)


def documents():
    """All texts in a fixed order, shuffled so that the held-out ones are of every kind."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.rglob("*.py") if not SKIPPED & set(path.relative_to(library).parts))
    texts = topics() + [text for path in files if (text := docstrings(path))]
    random.Random(0).shuffle(texts)
    return texts


def prepare(directory, source="", val="", tokenizer="bytes"):
    """Write the data set into `directory`; it takes no text of the user's."""
    if source or val:
        raise UserError(
            "tiny is made of Python's own documentation; give your text a name: --dataset mine --source FILE"
        )
    texts = documents()
    train = [text for index, text in enumerate(texts) if index % VAL_EVERY]
    source = f"documentation of Python {platform.python_version()}"
    write_dataset(directory, {"train": train, "val": texts[::VAL_EVERY]}, tokenizer, source)


def main():
    Parser(__doc__).parse_args()
    prepare(Path(__file__).parent)


if __name__ == "__main__":
    run_script(main)
