import os

import torch

# The tests' models are so small that threads cost more than they bring.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts that tests start
