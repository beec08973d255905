import shutil

import pytest

import data.write
from tests.robustness.helpers import run


@pytest.fixture(scope="session")
def home(tmp_path_factory, small_data):
    """A folder with data in `set`, and in `base` the model that SFT and DPO begin with. Nobody changes it."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(small_data, home / "set")
    run(home, "pretrain", home / "base", "--max_steps", 2)
    return home


@pytest.fixture(scope="module")
def no_pool():
    """Tokenize rows in this process: to start others would take longer than the work."""

    def parallel_map(function, chunks, *arguments, processes=None):
        return (function(chunk, *arguments) for chunk in chunks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.write, "parallel_map", parallel_map)
        yield
