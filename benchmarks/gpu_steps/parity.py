"""The same numbers as elsewhere: on the GPU as on the CPU, ours as LeRobot's, with and without deterministic kernels.

Differences are relative to the other side; tolerances are those of the tests on a CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from contenders import ACTION_DIM, Ours, make_batch, make_weights, model_config, rows_of, train_config
from torch import Tensor

from agent.batch import Batch, to_device
from agent.models.common.fp8 import use_fp8
from agent.models.common.modules import Linear
from agent.models.flow_matching import FlowDraws
from agent.models.pi import adapter
from agent.models.pi.model import PI0
from agent.reproducibility import make_deterministic
from agent.training import step_graph
from agent.training.step import make_pass
from agent.training.step_graph import GraphedPasses
from gpu_steps.place import Place, away

LOSS, GRADIENTS, ACTIONS = 1e-5, 1e-4, 1e-5
ROUNDED = 2e-2  # of a loss in bfloat16


def run(place: Place) -> None:
    """In both settings, because torch takes other kernels in either."""
    for deterministic in (False, True) if place.gpu else (True,):
        if deterministic:
            make_deterministic()
        kind = "deterministic" if deterministic else "as torch chooses"
        _against_the_cpu(place, kind)
        _against_itself(place, kind)
        if importlib.util.find_spec("lerobot") is None:
            place.tell(f"LeRobot, {kind}", None, why="not carried: scripts/gpu_wheels.sh --with_lerobot")
            continue
        for dtype in ("float32", "bfloat16"):
            _against_lerobot(place, kind, dtype)
    _eight_bits(place)
    _from_a_graph(place)


def _eight_bits(place: Place) -> None:
    """The products of ``fp8: mlp`` on the device against the same rounding in float32 on the CPU."""
    random = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(40, size, generator=random).bfloat16() for size in (256, 96))
    weight = torch.randn(96, 256, generator=random).bfloat16()
    found = []
    for device in (torch.device("cpu"), place.device):
        layer = Linear(256, 96, bias=False).to(device, torch.bfloat16)
        layer.load_state_dict({"weight": weight})
        use_fp8([layer], device)
        inputs = x.to(device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            out = layer(inputs)
        found.append([out, *torch.autograd.grad(out, (inputs, layer.weight), gradient.to(device))])
    differences = [away(ours, exact) for exact, ours in zip(*found, strict=True)]
    place.tell("products in 8 bits", max(differences) < ROUNDED, differences=differences)


def _from_a_graph(place: Place) -> None:
    """Losses and gradients of updates from a CUDA graph against those of the passes themselves."""
    config = model_config(place.size("reduced"), 2)
    batches = [make_batch(config, 2, 4, tokens, 1) for tokens in (6, 7, 6, 6, 6)]
    found = []
    for capture in (None, step_graph.cuda_capture if place.gpu else lambda function: function):
        ours = Ours(train_config(config, 4, use_bf16=True), batches[0], place.device)
        ours.arm()
        assert ours.run is not None
        once = partial(make_pass, ours.run)
        trained = [parameter for parameter in ours.policy.parameters() if parameter.requires_grad]
        if capture is None:
            for batch in batches:
                losses = once(to_device(batch, place.device))
        else:
            step_graph._GAIN = 0.0  # it is to be right, whether it pays is measured elsewhere
            graphs = GraphedPasses(once, trained, place.device, capture)
            for _ in range(3):  # the shape becomes known, and then has a graph
                graphs(batches[0], first=True)
                for parameter in trained:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
            for batch in batches:
                losses = graphs(batch, first=False)
            place.tell("a graph was made", graphs.active)
        found.append([losses["loss"], *(parameter.grad for parameter in trained if parameter.grad is not None)])
    differences = [away(ours, plain) for plain, ours in zip(*found, strict=True)]
    place.tell(
        "updates from a graph", max(differences) < GRADIENTS, largest=max(differences), equal=not any(differences)
    )


def _policy(place: Place, device: torch.device, weights: dict[str, Tensor]) -> PI0:
    policy = PI0(model_config(place.size("reduced"), 3)).to(device)
    policy.load_state_dict(weights)
    return policy


def _results(policy: PI0, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss of each sample, gradients by name, sampled actions."""
    losses = policy.total(policy(batch))
    losses.mean().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    first = replace(batch.draws, noise=_first(batch.draws.noise, 3), time=_first(batch.draws.time, 1))
    return losses.detach(), gradients, policy.sample_actions(batch.observation, first)


def _first(draws: Tensor, dims: int) -> Tensor:
    return draws if draws.dim() == dims else draws[:, 0]


def _against_the_cpu(place: Place, kind: str) -> None:
    cpu = torch.device("cpu")
    config = model_config(place.size("reduced"), 3)
    weights = make_weights(config, cpu)
    for label, present, padding, draws in (
        ("three cameras", 3, "none", 1),
        ("two cameras, padded", 2, "language", 1),
        ("cameras absent of some samples", 3, "mixed", 1),
        ("three draws, padded", 2, "language", 3),
    ):
        batch = make_batch(config, present, 2, config.tokenizer_max_length, draws, padding)
        expected = _results(_policy(place, cpu, weights), batch)
        got = _results(_policy(place, place.device, weights), to_device(batch, place.device))
        gradient, worst = _worst(got[1], expected[1], lambda name: name)
        loss, actions = away(got[0], expected[0]), away(got[2], expected[2])
        right = loss < LOSS and gradient < GRADIENTS and actions < ACTIONS
        place.tell(f"CPU, {label}, {kind}", right, loss=loss, gradients=gradient, worst=worst, actions=actions)


def _worst(ours: dict[str, Tensor], theirs: dict[str, Tensor], called: Callable[[str], str]) -> tuple[float, str]:
    """The largest difference of a gradient, and whose it is."""
    found = {}
    for name, gradient in ours.items():
        other, scale = theirs[called(name)], theirs[called(name)]
        if name.endswith("k_proj.bias"):  # zero up to rounding: softmax ignores what all keys share
            scale = theirs[called(name.removesuffix("bias") + "weight")]
        a, b, c = (x.detach().cpu().double() for x in (gradient, other, scale))
        found[name] = float((a - b).norm() / c.norm().clamp_min(1e-30))
    worst = max(found, key=lambda name: found[name])
    return found[worst], worst


def _against_itself(place: Place, kind: str) -> None:
    """A sample without a camera is that sample alone; several draws are as many passes."""
    config = model_config(place.size("reduced"), 3)
    policy = _policy(place, place.device, make_weights(config, place.device))
    mixed = to_device(make_batch(config, 3, 2, config.tokenizer_max_length, padding="mixed"), place.device)
    seen = next(iter(mixed.observation.images))
    second = rows_of(mixed, slice(1, None))
    images = {seen: second.observation.images[seen]}
    masks = {seen: second.observation.image_masks[seen]}
    alone = replace(second, observation=replace(second.observation, images=images, image_masks=masks))
    draws = to_device(make_batch(config, 3, 2, config.tokenizer_max_length, draws=3), place.device)
    each = [FlowDraws(draws.draws.noise[:, i], draws.draws.time[:, i]) for i in range(3)]
    with torch.no_grad():
        absent = away(policy(mixed)["flow"][1:], policy(alone)["flow"])
        passes = torch.stack([policy(replace(draws, draws=one))["flow"] for one in each]).mean(0)
        several = away(policy(draws)["flow"], passes)
    place.tell(f"a sample without a camera, {kind}", absent < LOSS, loss=absent)
    place.tell(f"several draws, {kind}", several < LOSS, loss=several)


def _against_lerobot(place: Place, kind: str, dtype: str) -> None:
    """Loss, gradients and actions in float32; in bfloat16 the loss, against float32's, as each trains."""
    from lerobot_contender import LeRobot

    config = model_config(place.size("reduced"), 3)
    rounded = dtype == "bfloat16"
    for present, padding in ((3, "none"), (2, "language"), (1, "language")):
        batch = make_batch(config, present, 2, config.tokenizer_max_length, padding=padding)
        theirs = LeRobot(config, batch, place.device, dtype=dtype)
        ours = Ours(train_config(config, 2, use_bf16=rounded), batch, place.device)
        label = f"LeRobot {dtype}, {present} of 3 cameras, {kind}"
        losses = ours.loss(), theirs.loss()
        if rounded:
            exact = ours.loss(exact=True)
            differences = [abs(loss - exact) / abs(exact) for loss in losses]
            place.tell(label, max(differences) < ROUNDED, loss=differences[0], theirs=differences[1])
            continue
        _, gradients, actions = _results(ours.policy, ours.batch)
        expected = _their_actions(theirs)
        theirs.policy.train()
        theirs.policy.forward(theirs.batch)[0].backward()
        named: dict[str, Any] = {n: p.grad for n, p in theirs.policy.named_parameters() if p.grad is not None}
        gradient, worst = _worst(gradients, named, adapter.LEROBOT.theirs)
        difference, acted = abs(losses[0] - losses[1]) / abs(losses[1]), away(actions[..., :ACTION_DIM], expected)
        right = difference < LOSS and gradient < GRADIENTS and acted < ACTIONS
        place.tell(label, right, loss=difference, gradients=gradient, worst=worst, actions=acted)


def _their_actions(theirs: Any) -> Tensor:
    policy, batch = theirs.policy.eval(), theirs.batch
    images, masks = policy._preprocess_images(batch)
    tokens, mask = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    with torch.no_grad():
        noise, state = batch["noise"], policy.prepare_state(batch)
        return policy.model.sample_actions(images, masks, tokens, mask, state, noise=noise)[..., :ACTION_DIM]
