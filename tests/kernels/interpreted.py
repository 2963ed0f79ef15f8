"""The Triton kernels run by Triton's interpreter on CPU tensors, whatever this process has imported before."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

import tell.kernels.triton_ops
from tell.kernels import ops
from tell.kernels.triton_ops import TritonKernels

SWITCH = "TRITON_INTERPRET"


def interpreted_code() -> ModuleType:
    """A second copy of ``triton_kernels`` whose functions are interpreted; the process's own stays as it is."""
    path = Path(tell.kernels.triton_ops.__file__).with_name("triton_kernels.py")
    spec = importlib.util.spec_from_file_location("interpreted_triton_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def interpretation() -> Iterator[TritonKernels]:
    """Interprets inside: Triton's own functions (``tl.sum``) too, which a loaded Triton has made for its compiler."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    import tell.kernels.triton_kernels  # noqa: F401  # the process's own are not to be made while the switch is set

    before: dict[tuple[int, str], tuple[object, str, object]] = {}
    exchange = interpreter._LangPatchScope.set_attr

    def set_attr(self, owner, name, value):
        before.setdefault((id(owner), name), (owner, name, getattr(owner, name, interpreter._MISSING)))
        exchange(self, owner, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        patch.setattr(interpreter._LangPatchScope, "set_attr", set_attr)
        for name, function in list(vars(tl.standard).items()):
            if isinstance(function, JITFunction):
                twin = InterpretedFunction(function.fn)
                patch.setattr(tl.standard, name, twin)
                if getattr(tl, name, None) is function:
                    patch.setattr(tl, name, twin)
        try:
            yield TritonKernels(interpreted_code())
        finally:  # a function that a kernel calls leaves the language exchanged, and the compiler would use that
            for owner, name, value in before.values():
                if value is not interpreter._MISSING:
                    setattr(owner, name, value)
                elif name in vars(owner):
                    delattr(owner, name)


@contextmanager
def in_place_of_c(kernels: TritonKernels) -> Iterator[TritonKernels]:
    """CPU tensors take the path of a GPU: the Triton kernels, and no product of the C ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.BACK_ENDS, "cpu", lambda x: kernels)
        patch.setattr("tell.train.fast.stacked.products_for", lambda x: None)
        yield kernels
