"""What makes L-Diff fast and safe.

You need not read it to understand a Differential Transformer or how one is trained. It imports nothing from the
scripts, model.py or data/.
"""

import contextlib
import os
from pathlib import Path

# PyTorch's threads on a CPU wait for each other in a loop. That is a sixth faster than to sleep, as long as each has a
# core; where other programs keep the cores busy, a run takes several times as long. Read when torch is imported.
with contextlib.suppress(OSError):  # only Linux has this file
    running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1  # this program not counted
    if running > os.cpu_count() / 4:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
