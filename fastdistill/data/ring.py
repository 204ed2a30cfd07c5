"""Draw points from eight Gaussians on a circle, whose law and velocity are known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.data.pictures import draw_points
from fastdistill.data.randomness import generator_at


class Ring:
    """Draw endless samples from eight Gaussians on a circle in the plane; there are no labels."""

    shape = (2,)
    num_classes = 0
    judge = "fastdistill.eval.ring:RingJudge"
    modes, radius, std = 8, 2.0, 0.2
    limit = 3.2
    """Half the side of each picture, in the units of the points."""

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, None]:
        """Return fresh points, x0 (size, 2) float32."""
        generator = generator_at(seed, "ring", step)
        angle = torch.randint(self.modes, (size,), generator=generator) * (2 * math.pi / self.modes)
        centre = self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        return centre + self.std * torch.randn(size, 2, generator=generator), None

    def picture(self, samples: Tensor, columns: int) -> bytes:
        """Draw points as a scatter plot, always at the same scale; `columns` has no meaning here."""
        return draw_points({"": samples}, self.limit)


DATA_SET = Ring
