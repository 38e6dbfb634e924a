"""`--check true`, the low-memory optimizer (its time, its rounding, its kernel's bits), and how long a policy takes to act."""

from __future__ import annotations

import gc
import os
import subprocess
from importlib import import_module

import numpy as np
import torch
from contenders import Ours, draw_weights, make_batch, model_config, train_config
from torch import nn

from agent.batch import to_device
from agent.models.pi.model import PI0
from agent.optim.optimizer import apply_update, clip_gradients, make_optimizer
from gpu_steps.demo import ROOT, command
from gpu_steps.place import Place

UPDATES, RATE, NUMBERS = 50, 1e-4, 1 << 20


def run(place: Place) -> None:
    """What is timed begins when the check, a process of its own, has ended."""
    log = place.work / "check.log"
    environment = os.environ | {"VLA_LOG_DIR": str(place.work / "runs")}
    with open(log, "w") as stream:
        check = subprocess.Popen([*command(place, "checked"), "--check", "true"], cwd=ROOT, env=environment,
                                 stdout=stream, stderr=subprocess.STDOUT)  # fmt: skip
    _rounding(place)
    _kernel(place)
    code = check.wait()
    print(log.read_text(), flush=True)
    place.tell("--check true", code == 0, exit_code=code)
    _optimizer(place)
    gc.collect()
    _latency(place)


def _rounding(place: Place) -> None:
    """Steps of a fortieth of the distance between two bfloat16 numbers: rounded to nearest, no weight would ever move."""
    module = nn.Linear(1024, NUMBERS // 1024, bias=False, device=place.device, dtype=torch.bfloat16)
    nn.init.ones_(module.weight)
    optimizer = make_optimizer(module, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for number in range(UPDATES):
        module.weight.grad = torch.ones_like(module.weight)
        apply_update(optimizer, RATE, number)
    gap = 2.0**-8  # between the numbers below one
    expected, mean = 1 - UPDATES * RATE, float(module.weight.double().mean())
    bound = 5 * gap / 2 * (UPDATES / NUMBERS) ** 0.5  # five standard deviations of a mean over so many coins
    place.tell("rounding is unbiased", abs(mean - expected) < bound, mean=mean, expected=expected, bound=bound)


def _kernel(place: Place) -> None:
    """Bit for bit what torch computes on a CPU."""
    if not place.gpu:
        place.tell("kernel of the optimizer", None, why="kernels run on a GPU alone")
        return
    try:  # imported by name: a version without a kernel is measured, too
        check, kernel = (import_module(f"agent.optim.one_pass_{part}") for part in ("check", "triton"))
    except ModuleNotFoundError as error:
        place.tell("kernel of the optimizer", None, why=str(error))
        return
    found = [check.differences(kernel.update_in_triton, update, 3) for update in check.examples(place.device)]
    wrong = [number for number, differences in enumerate(found) if differences]
    place.tell(
        "kernel of the optimizer", not wrong, examples=len(found), wrong=wrong, first=found[wrong[0]] if wrong else None
    )


def _optimizer(place: Place) -> None:
    """Seconds of clipping and an update of the whole model in bfloat16 with moments of eight bits."""
    config = model_config(place.size("full"), 1)
    config.freeze_lm_head = True
    training = train_config(config, 1, use_bf16=True, optimizer="adamw8bit", precision="bfloat16_stochastic")
    ours = Ours(training, make_batch(config, 1, 1, 8), place.device)
    ours.arm()
    assert ours.run is not None
    optimizer = ours.run.optimizer
    for parameter in ours.policy.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * 1e-3

    def update() -> None:
        clip_gradients(optimizer, 1.0)
        apply_update(optimizer, 1e-5, 0)

    numbers = sum(p.numel() for p in ours.policy.parameters() if p.requires_grad)
    seconds = place.repeated(update, 5 if place.gpu else 1)
    place.tell("update of the low-memory optimizer", None, seconds=seconds, numbers=numbers)


def _latency(place: Place) -> None:
    """Milliseconds from an observation on the device to its actions, as the policy server computes them, without a network."""
    config = model_config(place.size("full"), 3)
    with torch.device("meta"):
        policy = PI0(config).to(torch.bfloat16)
    draw_weights(policy.to_empty(device=place.device))
    policy.eval().requires_grad_(False)
    for size in (1, 8):
        batch = to_device(make_batch(config, 3, size, config.tokenizer_max_length, padding="language"), place.device)

        def act(batch=batch) -> None:  # noqa: ANN001
            with torch.no_grad(), torch.autocast(place.device.type, torch.bfloat16):
                policy.sample_actions(batch.observation, batch.draws).cpu()

        act()
        times = [1e3 * place.timed(act) for _ in range(20 if place.gpu else 2)]
        p50, p99 = np.percentile(times, (50, 99))
        place.tell(f"latency, {size} observations", None, p50_ms=float(p50), p99_ms=float(p99))
