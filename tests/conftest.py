"""What holds for every test: one thread per worker, so that `pytest -n 2` does not oversubscribe two cores."""

import torch

torch.set_num_threads(1)
