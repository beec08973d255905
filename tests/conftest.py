import os
import threading

import pytest
import torch
from tqdm import tqdm

from data.orca_dpo_pairs.prepare import tokenize as tokenize_pair
from data.slimorca.prepare import tokenize as tokenize_conversation
from data.write import write_dataset, write_examples

# The models in tests are so small that threads slow them down.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts that tests start

# Tests kill copies of this process. tqdm's own lock is shared between the copies: one that is killed while it holds the
# lock would stop all others for good.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that may hold the lock while a copy is made


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data set of bytes for all stages: 100 lines, 40 conversations, 40 pairs. A test that changes it copies it."""
    data = tmp_path_factory.mktemp("data")
    text = "".join(f"{i} bottles of beer on the wall\n" for i in range(100))
    write_dataset(data, {"train": [text], "val": [text[1000:1400]]}, "bytes", "a test")
    talks = [[("human", f"{i}?"), ("gpt", f"sum {i}")] for i in range(40)]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in talk]} for talk in talks]
    write_examples(data / "sft", rows, tokenize_conversation, "bytes", 32, "a test")
    pairs = [dict(system="", question=f"{i}", chosen="yes", rejected="no") for i in range(40)]
    write_examples(data / "dpo", pairs, tokenize_pair, "bytes", 32, "a test")
    return data
