"""Run in a process of its own, with the recording libcuda: the host of tests/gpu on tensors of the CPU.

Arguments: plugin library, folder to compile in, sources. Standard input: B T H HV K V, the name of a type and most B
and T, a line for each problem. Between the launches that the driver prints, where the tensors are, as JSON.
"""

import ctypes
import json
import sys
from pathlib import Path

import torch
from plugin_host import Plugin


def main(library: str, folder: str, sources: str) -> None:
    plugin = Plugin(Path(library), Path(folder), Path(sources))
    for line in sys.stdin:
        *words, dtype, most_B, most_T = line.split()
        (B, T, H, HV, K, V), dtype = map(int, words), getattr(torch, dtype)
        keys, values, state = (B, T, H, K), (B, T, HV, V), torch.zeros(B, HV, K, V)
        x = [torch.zeros(shape, dtype=dtype) for shape in (keys, keys, values, keys, keys, values)] + [state]
        x[3] = x[3].float()
        layer = plugin.attach(x, 0.375, (int(most_B), int(most_T)))
        o, final_state = torch.zeros_like(x[2]), torch.zeros_like(state)
        layer.enqueue(x, o, final_state, 5)
        ctypes.CDLL(None).fflush(None)  # what the driver printed comes first
        at = [y.data_ptr() for y in (*x, o, final_state)]
        print(
            json.dumps({"at": at, "workspace": layer.workspace.data_ptr(), "bytes": layer.workspace.numel()}),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
