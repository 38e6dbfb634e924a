"""An update on a GPU is the one on a CPU.

Run: pytest tests/training/test_update_on_gpu.py -m gpu   (on a machine with CUDA; seconds)
"""

from __future__ import annotations

import pytest
import torch
from support.small_model import lively_model, make_batch, relative
from torch import Tensor

from agent.batch import to_device
from agent.optim.optimizer import apply_update, clip_gradients, freeze, make_optimizer

pytestmark = pytest.mark.gpu


def updated(device: str, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """The losses before an update, and all weights after it.

    With a large eps, because AdamW makes a step of mere rounding, too.
    """
    model = lively_model().to(device)
    freeze(model, model.frozen_parameters())
    optimizer = make_optimizer(model, lr=1e-3, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.01)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        losses = model(to_device(make_batch(), device))["flow"]
    losses.mean().backward()
    clip_gradients(optimizer, 1.0)
    apply_update(optimizer, 1e-3, 0)
    return losses.detach().cpu(), torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


def test_an_update_is_that_of_the_cpu() -> None:
    before = torch.cat([p.detach().flatten() for p in lively_model().parameters()])
    (losses, weights), (their_losses, their_weights) = updated("cuda"), updated("cpu")
    assert relative(losses, their_losses) < 1e-5
    assert relative(weights - before, their_weights - before) < 1e-3


def test_an_update_in_bfloat16_is_nearly_that_in_float32() -> None:
    (losses, _), (exact, _) = updated("cuda", bf16=True), updated("cuda")
    assert 0 < relative(losses, exact) < 2e-2
