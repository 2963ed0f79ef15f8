"""The mean of the weights over the last steps of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tell.train.flat import FlatAdapters


class WeightMean:
    """Running mean, in fp32, of the weights after each of the last steps.

    Uniform averaging over one trajectory: Izmailov et al. 2018 (arXiv 1803.05407), Kaddour 2022 (arXiv 2209.14981). A
    and B of LoRA are averaged each for itself.

    Args:
        parameters: trained parameters by name.
        share: of the steps that are averaged, the last ones, rounded up; above 0, at most 1.
        steps: of the whole training.
        flat: the parameters as one tensor, if they are.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], share: float, steps: int, flat: FlatAdapters | None = None
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"a share of {share} of the steps")
        self.begin = steps - max(1, math.ceil(share * steps - 1e-9))  # 0.7 * 10 is a little more than 7
        weights = dict(parameters) if flat is None else {"": flat.weight}
        means = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in weights.items()}
        self.pairs = [(weights[name], means[name]) for name in weights]
        self.means = means if flat is None else flat.parts(means[""])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state, by names for a checkpoint; how many steps it holds follows from the position."""
        return {f"average/{name}": mean for name, mean in self.means.items()}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Count in the weights after ``step`` optimiser steps, if that is one of the last."""
        if (n := step - self.begin) > 0:
            for p, mean in self.pairs:
                mean.lerp_(p.float(), 1 / n)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the mean in place of the weights."""
        for p, mean in self.pairs:
            p.copy_(mean)
