"""Imports point down: dpo -> sft -> train -> model, lora, data -> engine."""

import ast
import importlib.util
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each part of the project may import of the others.
ALLOWED = {
    "engine": set(),
    "lora": set(),
    "model": {"engine"},
    "data": {"engine"},
    "train": {"model", "lora", "data", "engine"},
    "sft": {"train", "model", "lora", "data", "engine"},
    "dpo": {"sft", "train", "model", "lora", "data", "engine"},
    "convert": {"sft", "train", "model", "data", "engine"},
    "sample": {"sft", "train", "model", "data", "engine"},
    "viewer": {"bench", "sample", "sft", "train", "model", "data", "engine"},
    "bench": {"sample", "dpo", "sft", "train", "model", "lora", "data", "engine"},
}


def find_modules():
    """{name: path} of the project's modules; a package's name is that of its __init__.py."""
    files = [path for part in ALLOWED for path in (ROOT / f"{part}.py", *(ROOT / part).rglob("*.py")) if path.exists()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return dict(zip(names, files))


def find_imports(path, modules):
    """Names of the project's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this test does not follow"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (members & modules.keys()) | ({node.module} if members - modules.keys() else set())
    return {name for name in names if name.split(".")[0] in ALLOWED}


MODULES = find_modules()
IMPORTS = {name: find_imports(path, MODULES) for name, path in MODULES.items()}


def test_all_parts_are_read():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert scripts <= ALLOWED.keys(), "a new module needs a line in ALLOWED"
    assert {name.split(".")[0] for name in MODULES} == ALLOWED.keys()
    assert "engine.attention" in IMPORTS["model"] and "data.dataset" in IMPORTS["train"] and "train" in IMPORTS["sft"]


def test_imports_point_down():
    part = {name: name.split(".")[0] for names in IMPORTS.values() for name in {*MODULES, *names}}
    upward = [(a, b) for a, names in IMPORTS.items() for b in names if part[b] not in {part[a], *ALLOWED[part[a]]}]
    assert not upward


def test_no_modules_import_each_other():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names them


def test_the_package_data_has_no_code():
    [docstring] = ast.parse((ROOT / "data" / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_no_module_hides_one_that_transformers_imports():
    """As a module `kernels` on the top level did, for Python looks in the current folder first."""
    code = "from transformers import LlamaForCausalLM"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
