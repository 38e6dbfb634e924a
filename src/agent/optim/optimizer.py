"""Chooses which parameters are trained, makes their optimizer, and names its state for checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from agent.optim.low_memory_adamw import LowMemoryAdamW
from agent.parallel import sharding


def freeze(module: nn.Module, frozen: dict[str, str]) -> str:
    """Sets ``requires_grad`` of every parameter and returns a table: per reason and per module, how many.

    Args:
        module: the policy.
        frozen: name → reason of each parameter that is not trained; all others are.

    Raises:
        ValueError: if nothing is left to train.
    """
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
        entry = counts[(frozen.get(name, "trained"), name.split(".")[0])]
        entry[0] += 1
        entry[1] += parameter.numel()
    unknown = set(frozen) - {name for name, _ in module.named_parameters()}
    assert not unknown, f"frozen parameters that the model does not have: {sorted(unknown)}"
    if not any(reason == "trained" for reason, _ in counts):
        raise ValueError("every parameter is frozen; nothing would be trained")
    rows = [
        f"  {reason:<48} {part:<20} {tensors:>5} tensors {numbers / 1e6:>10.3f} M"
        for (reason, part), (tensors, numbers) in sorted(counts.items(), key=lambda item: item[0][0] != "trained")
    ]
    return "\n".join(["parameters:", *rows])


def make_optimizer(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    eight_bit: bool = False,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Makes AdamW (Loshchilov & Hutter, arXiv:1711.05101) over every parameter that is trained, in one group.

    One group, as LeRobot and openpi have it: the weight decay of the model config holds for all of them.

    Args:
        module: the policy. Parameters of bfloat16 are rounded stochastically.
        lr: learning rate of the first update.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        eight_bit: hold the moments in eight bits a number.
        seed: of the bits that round weights of bfloat16.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if eight_bit or any(p.dtype == torch.bfloat16 for _, p in named):
        return LowMemoryAdamW(
            named, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, eight_bit=eight_bit, seed=seed
        )
    parameters = [p for _, p in named]
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scales the gradients for the coming update to at most this norm.

    Returns:
        The norm before that, one number on the device, the same on every process. A collective if the gradients are
        sharded.
    """
    if isinstance(optimizer, LowMemoryAdamW):
        return optimizer.clip(max_norm)
    return sharding.clip_grad_norm([p for group in optimizer.param_groups for p in group["params"]], max_norm)


def apply_update(optimizer: torch.optim.Optimizer, lr: float, number: int) -> None:
    """Makes an update at this learning rate; ``number`` is that of the update, counted from 0, skipped ones included."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if isinstance(optimizer, LowMemoryAdamW):
        optimizer.update = number
    optimizer.step()


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Returns the optimizer's state as named tensors: ``exp_avg/<parameter>``, …"""
    state = optimizer.state
    return {
        f"{key}/{name}": value
        for name, parameter in module.named_parameters()
        if parameter in state
        for key, value in state[parameter].items()
    }


def allocate_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, Tensor]:
    """Makes room in the optimizer for what :func:`optimizer_tensors` gave, on each parameter's device.

    Args:
        optimizer: fresh.
        module: the policy.
        shapes: name of a tensor of the state → its shape and type.

    Returns:
        The tensors of the state under these names, to be filled.

    Raises:
        ValueError: if the tensors are not exactly those of this model's trained parameters.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    seen = {key.split("/", 1)[1] for key in shapes}
    if seen != set(trained):
        raise ValueError(
            f"the checkpoint's optimizer state is of other parameters: missing {sorted(set(trained) - seen)[:5]}, "
            f"extra {sorted(seen - set(trained))[:5]}; what is frozen must not change on a resume"
        )
    states = {name: _new_state(optimizer, parameter) for name, parameter in trained.items()}
    expected = {f"{kind}/{name}": tensor for name, state in states.items() for kind, tensor in state.items()}
    holes, unknown = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if unknown:
        raise ValueError(
            f"the checkpoint's optimizer state is of another kind: {unknown[:5]} is not of this optimizer; write the "
            "`optimizer` and `precision` that the checkpoint was made with"
        )
    if holes:
        raise ValueError(f"the checkpoint's optimizer state is incomplete: missing {holes[:5]}")
    for key, (shape, dtype) in shapes.items():
        if shape != tuple(expected[key].shape):
            raise ValueError(f"optimizer state {key} has shape {shape}, the model has {tuple(expected[key].shape)}")
        if dtype != expected[key].dtype:
            raise ValueError(
                f"optimizer state {key} is {dtype}, this optimizer's is {expected[key].dtype}; write the `optimizer` and "
                "`precision` that the checkpoint was made with"
            )
    for name, state in states.items():
        optimizer.state[trained[name]] = state
    return expected


def _new_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Makes what the optimizer keeps of a parameter, before the first update."""
    if isinstance(optimizer, LowMemoryAdamW):
        return optimizer.new_state(parameter)
    moments = ("exp_avg", "exp_avg_sq")
    empty = {kind: torch.empty_like(parameter, requires_grad=False) for kind in moments}
    return {"step": torch.zeros((), device=parameter.device), **empty}
