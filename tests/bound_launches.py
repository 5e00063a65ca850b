"""Run in a process under TRITON_INTERPRET=0: prints, as JSON, what the launchers hand to Triton's compiler for CPU
tensors and a driver that has a target and no GPU. Nothing is launched; all before that is as on a GPU, and the front
end of the compiler has to accept every launch as it is, absent tensors included.
"""

import contextlib
import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from gdn2_ops import kernels
from gdn2_ops.kernels import kernel


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class FrontEndIsDone(Exception):
    """Triton's own representation is made; the rest of the compiler takes seconds."""


BOUND: list[dict] = []
do_compile = JITFunction._do_compile


def record(self, key, signature, device, constexprs, options, *rest):
    names = {self.arg_names[i[0]]: value for i, value in constexprs.items()}
    BOUND.append({"kernel": self.fn.__name__, "types": signature, "constexprs": names, "warps": options.num_warps})
    with contextlib.suppress(FrontEndIsDone):
        do_compile(self, key, signature, device, constexprs, options, *rest)


def stop(*_, **__):
    raise FrontEndIsDone


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    JITFunction._do_compile = record
    CUDABackend.make_ttgir = staticmethod(stop)
    JITFunction.__getitem__ = lambda self, grid: lambda *x, **options: self.warmup(*x, grid=grid, **options)
    kernel.arch = lambda device: 90
    for size in (64, 50):
        kernels.warm_up("cpu", torch.bfloat16, size, size, ("chunk", "backward", "step", "step_layer"))
    print(json.dumps(BOUND))


if __name__ == "__main__":
    main()
