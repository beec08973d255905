"""The built-in data sets, made of a part of Python's documentation."""

import difflib
from pathlib import Path

import pytest

from data.dataset import open_examples, open_tokens, read_meta
from data.tiny import prepare as tiny
from engine.settings import UserError


@pytest.fixture(scope="module", autouse=True)
def part_of_the_library():
    """Leave most files out: to parse all takes 5 seconds."""
    files = [path for index, path in enumerate(tiny.library_files()) if index % 20 == 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "library_files", lambda: [*files, Path(difflib.__file__)])
        yield


def test_text():
    documents = tiny.documents()
    assert sum(map(len, documents)) > 200_000
    assert any("def get_close_matches(" in text and "list of the best" in text for text in documents)
    assert len(set(documents)) > 0.95 * len(documents)  # so little of what is held out is trained on


def test_docstrings_are_found_without_importing(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text(
        '"""Module text."""\nraise SystemExit\nclass A:\n    """Class text."""\n    def f(self, x):\n        "F."\n'
    )
    assert (
        tiny.docstrings(file)
        == "module sample\n\nModule text.\n\n\nclass A:\n\nClass text.\n\n\ndef f(self, x):\n\nF.\n"
    )


def test_questions_and_preferences():
    pairs = tiny.questions()
    set_seqs = "What does the function difflib.SequenceMatcher.set_seqs do?", "Set the two sequences to be compared."
    assert set_seqs in pairs
    assert len(pairs) > 200 and len({answer for _, answer in pairs}) == len(pairs)
    rows = list(tiny.preferences(pairs))
    answers = [row[side] for row in rows for side in ("chosen", "rejected")]
    assert len(rows) > 40 and len(set(answers)) == len(answers)  # so nothing that is held out is trained on
    assert all((row["question"], row["chosen"]) in pairs for row in rows)
    about_functions = [row["question"].startswith("What does the function") for row in rows]
    assert 0.45 < sum(about_functions) / len(rows) < 0.55


@pytest.mark.parametrize("prepare", [tiny.prepare_text, tiny.prepare_sft, tiny.prepare_dpo])
def test_a_source_is_refused(tmp_path, prepare):
    with pytest.raises(UserError, match="--dataset mine"):
        prepare(tmp_path, source="text.txt")


def test_every_stage_has_data(tmp_path):
    for prepare in (tiny.prepare_text, tiny.prepare_sft, tiny.prepare_dpo):
        prepare(tmp_path / prepare.__name__)
    assert len(open_tokens(tmp_path / "prepare_text", "val", read_meta(tmp_path / "prepare_text"))) > 10_000
    for folder, group in ((tmp_path / "prepare_sft", 1), (tmp_path / "prepare_dpo", 2)):
        meta = read_meta(folder)
        assert meta["report"] == {"rows": sum(meta["examples"].values()), "cut": 0}
        assert len(open_examples(folder, "val", meta, group, 256)) == meta["examples"]["val"] > 0
