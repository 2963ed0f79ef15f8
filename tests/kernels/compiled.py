"""The Triton kernels compiled for a GPU that is not there, down to its machine code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tell.kernels.triton_ops import TritonKernels

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}


class CompiledKernels(TritonKernels):
    """Compiles each launch for a compute capability instead of running it; tensors may be on the meta device."""

    def __init__(self, capability: int) -> None:
        from tell.kernels import triton_kernels

        super().__init__(triton_kernels)
        self.capability, self.binaries = capability, {}

    def launch(self, kernel: Any, grid: tuple[int, ...], first: Tensor, *rest: object, **options: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        signature, constants, attributes = {}, {}, {}
        values = dict(zip(kernel.arg_names, (first, *rest), strict=False)) | options
        build = {name: values.pop(name) for name in ("num_warps",) if name in values}
        assert list(values) == kernel.arg_names
        for i, (name, value) in enumerate(values.items()):
            if kernel.params[i].is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name], attributes[(i,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not kernel.params[i].do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, _described(attributes))
        self.binaries[kernel.__name__] = compile(source, GPUTarget("cuda", self.capability, 32), build)


def _described(attributes: dict[tuple[int], list[list[object]]]) -> object:
    """The attributes as Triton wants them; before 3.3 as an object."""
    from triton.backends import compiler

    if not hasattr(compiler, "AttrsDescriptor"):
        return attributes
    return compiler.AttrsDescriptor.from_hints({i: 16 for (i,) in attributes})
