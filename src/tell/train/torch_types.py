"""Types that torch's own stubs lack: an autograd context and a module with attributes of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from typing import Any

    from torch.autograd.function import FunctionCtx

    class Context(FunctionCtx):
        """The context of an autograd function; ``forward`` leaves in its attributes what ``backward`` needs."""

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: object) -> None: ...

        def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...

    class AnyModule(nn.Module):
        """A module of transformers: its parts are looked up, not declared."""

        def __getattr__(self, name: str) -> Any: ...
else:
    Context = object
    AnyModule = nn.Module
