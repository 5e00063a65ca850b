"""The Triton kernels, and beside each of them the function that launches it. Below the operators: they know no caller.

tiles.py is the table of tile sizes, kernel.py how a kernel is described and launched, catalog.py lists them for those
who build them ahead of time; `warm_up` compiles before a first request. The other files hold kernels. Under
TRITON_INTERPRET=1, read when this package is imported, the same launchers run CPU tensors in Triton's interpreter,
float32 and float16 only: it rounds bfloat16 wrongly.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError("gdn2_ops.kernels needs triton: pip install 'gdn2-ops[triton]'") from error

from gdn2_ops.kernels.warming import warm_up

__all__ = ["warm_up"]
