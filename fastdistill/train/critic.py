"""Train the second network of the methods that compare scores: the samples' own score, and a discriminator.

Nothing else in the trainer has a second optimiser. All of its randomness is a function of the seed and the step, and
all of its state is in the checkpoint, so that it resumes as exactly as the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data import generator_at
from fastdistill.objectives.critic import fake_score_loss, gan_critic_loss
from fastdistill.objectives.scores import CriticSettings, ScoreMethod
from fastdistill.objectives.settings import Context, Metrics


class Discriminator(nn.Module):
    """Logits (B,) of states x at tau being noised data: a copy of a network, and a linear layer on what it returns."""

    def __init__(self, net: nn.Module, elements: int) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(True).train()
        self.head = nn.Linear(elements, 1)

    def forward(self, x: Tensor, tau: Tensor, y: Tensor | None) -> Tensor:
        """Evaluate the network at x (B, ...), tau (B,) and y (B,) or None."""
        return self.head(self.net(x, t=tau, s=tau, y=y).flatten(1).to(self.head.weight.dtype)).squeeze(1)


class Critic:
    """Critic: the fake-score network, the discriminator where there is one, and the optimiser of both.

    Args:
        teacher: whose weights the networks start from; it stays as it is.
        settings: of the method.
        shape: of a row of data.
        betas: of the optimiser.
    """

    def __init__(
        self, teacher: nn.Module, settings: CriticSettings, shape: tuple[int, ...], betas: tuple[float, float]
    ) -> None:
        self.settings = settings
        self.fake = copy.deepcopy(teacher).requires_grad_(True).train()
        device = next(teacher.parameters()).device
        elements = torch.Size(shape).numel()
        self.gan = Discriminator(teacher, elements).to(device) if settings.gan else None
        self.weights = [weight for net in self._networks().values() for weight in net.parameters()]
        self.optimizer = torch.optim.AdamW(self.weights, lr=settings.lr, betas=betas, weight_decay=0.0, fused=True)

    def warm_up(self, context: Context, method: ScoreMethod, precision: torch.autocast) -> None:
        """Update before the generator's first update by scores: at that step, before its loss; at no other."""
        first = self.settings.updates
        extra = self.settings.warmup_updates * (context.step == method.starts)
        self._train(context, method, precision, range(first, first + extra))

    def update(self, context: Context, method: ScoreMethod, precision: torch.autocast) -> Metrics:
        """Train on fresh samples of the generator; the metrics of the last update. None before `method.starts`.

        Args:
            method: which draws the samples.
            precision: the autocast of the run's forward passes.
        """
        if context.step < method.starts:
            return {}
        return self._train(context, method, precision, range(self.settings.updates))

    def _train(self, context: Context, method: ScoreMethod, precision: torch.autocast, numbers: range) -> Metrics:
        settings = self.settings
        self.optimizer.zero_grad(set_to_none=True)  # the generator's loss left some in the discriminator
        metrics: Metrics = {}
        for number in numbers:
            generator = generator_at(context.seed, f"critic {number}", context.step)
            batch = context.batch
            with precision:
                samples = method.draw_samples(context, generator)
                noise = torch.randn(batch.x0.shape, generator=generator).to(context.device)
                tau = settings.trained_levels.sampler(context.path)(context.rows, generator, context.device)
                loss, found = fake_score_loss(self.fake, samples, noise, tau, y=batch.y, path=context.path)
                metrics = {"critic_loss": found["loss"]}
                if self.gan is not None:
                    adversarial = gan_critic_loss(self.gan, batch.x0, samples, noise, tau, y=batch.y, path=context.path)
                    metrics["discriminator_loss"] = adversarial.detach()
                    loss = loss + adversarial
            loss.backward()
            metrics["critic_grad_norm"] = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state of networks and optimiser."""
        networks = {name: net.state_dict() for name, net in self._networks().items()}
        return networks | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring back what `state_dict` gave."""
        for name, net in self._networks().items():
            net.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _networks(self) -> dict[str, nn.Module]:
        return {"fake": self.fake} | ({"gan": self.gan} if self.gan is not None else {})
