"""The Triton kernels run by Triton's interpreter on CPU tensors, whatever this process has imported before."""

from __future__ import annotations

import importlib.util
import sys
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


def _language() -> list[tuple[ModuleType | type, dict[str, object]]]:
    """The modules and classes of Triton's language, and what they hold."""
    modules = [module for name, module in sys.modules.items() if name.startswith("triton.language")]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [(owner, dict(vars(owner))) for owner in (*modules, *classes)]


@contextmanager
def interpretation() -> Iterator[TritonKernels]:
    """Interprets inside: Triton's own functions (``tl.sum``) too, which a loaded Triton has made for its compiler."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    import tell.kernels.triton_kernels  # noqa: F401  # the process's own are not to be made while the switch is set

    before, exchange = _language(), interpreter._patch_lang

    def patch_lang(function):
        scope = exchange(function)
        tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())  # Triton 3.6 needs NumPy before 2.4
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        patch.setattr(interpreter, "_patch_lang", patch_lang)
        for name, function in list(vars(tl.standard).items()):
            if isinstance(function, JITFunction):
                twin = InterpretedFunction(function.fn)
                setattr(tl.standard, name, twin)
                if getattr(tl, name, None) is function:
                    setattr(tl, name, twin)
        try:
            yield TritonKernels(interpreted_code())
        finally:  # the language is left exchanged in part, of Triton 3.2 whole, and the compiler would use that
            for owner, held in before:
                for name in vars(owner).keys() - held if isinstance(owner, type) else ():
                    delattr(owner, name)
                for name, value in held.items():
                    if vars(owner).get(name) is not value:
                        setattr(owner, name, value)


@contextmanager
def in_place_of_c(kernels: TritonKernels) -> Iterator[TritonKernels]:
    """CPU tensors take the path of a GPU: the Triton kernels, and no product of the C ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.BACK_ENDS, "cpu", lambda x: kernels)
        patch.setattr("tell.train.fast.stacked.products_for", lambda x: None)
        yield kernels
