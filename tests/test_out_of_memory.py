"""Where there is no memory for scratch an operator raises and the process lives on. Linux: /proc, resource limits."""

import subprocess
import sys

CODE = """
import resource, torch, gdn2_ops

def call(T):
    x = [torch.zeros(1, T, h, 16) for h in (1, 1, 16, 1, 1, 16)]  # q k v g b w
    {call}

torch.set_num_threads(2)
call(64)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20), resource.RLIM_INFINITY))
try:
    call(60_000)  # in and out 280 MB, scratch 310 MB
except RuntimeError as error:
    print(error)
call(64)
"""
BACKWARD = "torch.ops.gdn2.chunk_backward(x[2], None, *x, None, None, 0.25)"


def test_the_backward_pass_raises_and_the_process_lives_on():
    done = subprocess.run([sys.executable, "-c", CODE.replace("{call}", BACKWARD)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gdn2::chunk_backward: expected memory for its scratch, got none" in done.stdout
