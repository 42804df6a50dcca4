"""Optimizer, learning-rate schedule and averaged weights; nothing here draws random numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from rafce_ray.base.errors import UsageError

MOMENTUM = 0.9
"""Of sgd, in Nesterov's form."""

NOT_DECAYED = frozenset({"class_token", "pos_embedding", "queries"})
"""Parameters of more than one dimension that stand for positions or tokens, not for weights of a map."""


def build_optimizer(module: nn.Module, name: str, *, lr: float, weight_decay: float) -> Optimizer:
    """An optimizer over the trainable parameters: adamw, adam (decay as an L2 term) or sgd (Nesterov momentum 0.9).

    Weight matrices and kernels decay; biases, norms, other parameters with a single axis longer than 1, tokens and
    position embeddings do not. The fused kernels update all parameters in one pass, on CUDA and on the CPU.

    Raises:
        UsageError: an unknown name, or nothing to train.
    """
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.squeeze().ndim > 1 and key.rpartition(".")[2] not in NOT_DECAYED
            (decayed if decays else free).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, weight_decay), (free, 0.0))
        if parameters
    ]
    if not groups:
        raise UsageError("every parameter is frozen: nothing is left to train. Set model.freeze_backbone=false.")
    if name == "adamw":
        return AdamW(groups, lr=lr, fused=True)
    if name == "adam":
        return Adam(groups, lr=lr, fused=True)
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=True, fused=True)
    raise UsageError(f"optim.optimizer: found {name!r}; expected adamw, adam or sgd.")


def learning_rate(step: int, *, total_steps: int, warmup_steps: int, lr: float, schedule: str) -> float:
    """The learning rate of a step (0-based, counted from the start of the run).

    Linear warm-up over ``warmup_steps``, the last of which runs at ``lr``; then ``constant``, or half a ``cosine`` that
    would reach 0 at step ``total_steps`` and stays there.

    Raises:
        UsageError: an unknown schedule.
    """
    if schedule not in ("cosine", "constant"):
        raise UsageError(f"optim.schedule: found {schedule!r}; expected cosine or constant.")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def build_ema(module: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of parameters and buffers, on the module's device; None for a decay of 0.

    After n updates the next one keeps a share of min(decay, (1 + n) / (10 + n)), so that the average of a short run is
    not its initial weights. The first update copies. Integer buffers are always copied.
    """
    if decay <= 0:
        return None

    @torch.no_grad()
    def update(averaged: Any, current: Any, _: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            # The argument is a copy of this counter on the device, which would have to be waited for.
            done = int(ema.n_averaged)
            torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1 + done) / (10 + done)))
        else:
            torch._foreach_copy_(averaged, current)

    ema = AveragedModel(module, multi_avg_fn=update, use_buffers=True)
    ema.requires_grad_(False).eval()
    return ema
