"""A cubin launched through the driver by what its manifest says alone is the operator."""

import ctypes
import json
import os
import subprocess
import sys

import torch
from cases import Case, inputs

import gdn2_ops

CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def check(status: int) -> None:
    assert status == 0, f"CUresult {status}"


def launch(driver, cubin: bytes, entry: dict, hidden: int, values: dict, programs: int) -> None:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver.cuModuleLoadData(ctypes.byref(module), cubin))
    check(driver.cuModuleGetFunction(ctypes.byref(function), module, entry["symbol"].encode()))
    parameters = []
    for parameter in entry["parameters"]:
        value, kind = values[parameter["name"]], parameter["type"]
        pointer = kind.startswith("*")
        parameters.append(ctypes.c_void_p(value.data_ptr()) if pointer else CTYPES[kind](value))
        assert ctypes.sizeof(parameters[-1]) == parameter["size"]
    parameters += [ctypes.c_void_p(0)] * hidden
    addresses = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(parameter) for parameter in parameters))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    blocks = (programs, 1, 1, entry["threads"], 1, 1)
    check(driver.cuLaunchKernel(function, *blocks, entry["shared_memory"], stream, addresses, None))
    torch.cuda.synchronize()
    check(driver.cuModuleUnload(module))


def test_the_step_of_a_manifest(device, tmp_path):
    major, minor = torch.cuda.get_device_capability()
    from gdn2_ops.kernels import tiles

    arch = tiles.table_arch(major, minor)
    selection = ["--kernel", "step", "--arch", str(arch), "--dtype", "bf16", "--head-size", "64x128"]
    command = [sys.executable, "-m", "gdn2_ops.cli", "build-kernels", "-o", str(tmp_path), *selection]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "0"}, timeout=300)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    entry = next(entry for entry in manifest["kernels"] if entry["options"] == {"SLOTS": 0, "MASKED": 0})
    x = inputs(Case("from a cubin", 1, B=3, HV=4, K=64, V=128), torch.bfloat16)
    values = {name: y[:, 0].to(device).contiguous() for name, y in zip("qkvgbw", x[:6])}
    state = x.state.to(device)
    want_o, want_state = gdn2_ops.step(*values.values(), state, scale=0.25)
    o, final_state = torch.full_like(values["v"], float("nan")), torch.full_like(state, float("nan"))
    values |= {"state": state, "slots": state, "H": 2, "HV": 4, "P": 3, "key_size": 64, "value_size": 128}
    values |= {"scale": 0.25, "o": o, "final_state": final_state}
    programs = 3 * 4 * (128 // entry["constexprs"]["BV"])
    cubin = (tmp_path / entry["file"]).read_bytes()
    launch(ctypes.CDLL("libcuda.so.1"), cubin, entry, len(manifest["hidden_parameters"]), values, programs)
    assert torch.equal(o, want_o) and torch.equal(final_state, want_state)
