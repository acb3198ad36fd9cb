"""The triton backend: the reference's integers from kernels on a GPU.

Small and rare operations are the reference's own, which computes wherever its tensors are.
"""

from qtool.kernels.reference import Reference


class Triton(Reference):
    """Kernels that Triton compiles for the GPU at first use."""

    name = "triton"
