"""From the accumulated gradients of a step to the next weights: loss scale, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tell.config_sections import TrainConfig
from tell.train.device import FAST_DEVICES
from tell.train.flat import FlatAdapters

FIRST_SCALE = 2.0**12  # lower than torch's 2^16: a run may have 20 steps, and a skipped one has lost its rows
MOST_SKIPPED = 20  # steps in a row; the loss scale has fallen far below 1 by then


def _scaler(device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE)


class Update:
    """AdamW over the trained parameters, never waiting for a GPU.

    In fp16 the loss is scaled as by ``torch.amp.GradScaler``: where gradients overflow, the step is skipped on the
    device and the scale halved.

    Args:
        parameters: trained parameters by name.
        config: with its learning rate resolved.
        dtype: of the model's weights.
        flat: the same parameters as one tensor; None: each is updated for itself.

    Attributes:
        scale: of the loss, a scalar on the device whose address stays; None for 1.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        dtype: torch.dtype,
        flat: FlatAdapters | None = None,
    ) -> None:
        self.flat = flat
        self.tensors = [flat.weight] if flat is not None else list(parameters.values())
        self.device = self.tensors[0].device
        self.max_norm = config.max_grad_norm or float("inf")
        self.optimizer = torch.optim.AdamW(
            self.tensors,
            lr=config.learning_rate or 0.0,
            weight_decay=config.weight_decay,
            fused=self.device.type in FAST_DEVICES or None,  # None: torch decides
        )
        self.scaler = _scaler(self.device) if dtype == torch.float16 else None
        self.scale = None if self.scaler is None else torch.empty((), device=self.device)
        self._one = torch.ones((), device=self.device)
        self._take_scale()

    def _take_scale(self) -> None:
        if self.scaler is not None and self.scale is not None:
            self.scale.copy_(self.scaler.scale(self._one))

    def clip(self) -> Tensor:
        """Clip the accumulated gradients; their norm before, a scalar on the device, not finite where they overflow."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.tensors, self.max_norm)

    def apply(self, rate: float, bad: Tensor | None = None) -> None:
        """Update the weights, and zero the gradients.

        Args:
            rate: learning rate.
            bad: fp32 scalar on the device; where it is 1, the weights stay as they are.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._take_scale()
        else:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # read by the fused AdamW
            self.optimizer.step()
        if self.flat is not None:
            self.flat.refresh()
        self.clear()

    def clear(self) -> None:
        """Zero the gradients, in place where they are one tensor, whose views stay; they can be clipped once more."""
        if self.scaler is not None:
            self.scaler._per_optimizer_states.clear()  # a step that is repeated may have been unscaled already
        if self.flat is not None:
            self.flat.grad.zero_()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds next to the optimiser's tensors; waits for the device."""
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict()}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """The inverse of ``facts``; without the loss scale of a checkpoint in another number format."""
        if self.scaler is not None and "scaler" in facts:
            self.scaler.load_state_dict(facts["scaler"])
            self._take_scale()
