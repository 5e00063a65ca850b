"""The operators `torch.ops.gdn2.*`: importing this package registers them. Nothing here is public Python API.

native_library.py loads the schemas and the CPU kernels of native/, contract.py says what an operator accepts and
returns, dispatch.py which kernel runs it on other devices, autograd.py how it is differentiated.
"""

from gdn2_ops.custom_ops import native_library

native_library.load_torch_library()  # first: the schemas that the others add to

from gdn2_ops.custom_ops import autograd, contract, dispatch

__all__ = ["autograd", "contract", "dispatch", "native_library"]
