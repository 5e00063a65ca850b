"""The operators `torch.ops.gdn2.*`: importing this package registers them. Nothing here is public Python API.

contract.py says what an operator accepts and returns, dispatch.py which kernel runs it on which device, autograd.py
how it is differentiated.
"""

from gdn2_ops.custom_ops import autograd, contract, dispatch

__all__ = ["autograd", "contract", "dispatch"]
