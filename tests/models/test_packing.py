"""Batches of robots with different cameras and instructions of different lengths: computed without padding, to the same numbers.

Run: uv run pytest tests/models/test_packing.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.small_model import CAMERAS, PATCHES, flow, lively_model, make_batch, relative, several_pairs

from agent.batch import Batch, Real
from agent.models.common.attention import Packing, _by_length, attend, attend_by_length
from agent.models.common.packing import arrange
from agent.models.pi.model import PI0

HAVE = {
    CAMERAS[0]: [True] * 5,
    CAMERAS[1]: [True, False, True, False, False],
    CAMERAS[2]: [True, False, False, False, True],
}
WORDS = [3, 8, 5, 8, 1]


def mixed(**changes: object) -> Batch:
    """Five samples with three, one, two, one and two cameras; the second and the fourth are equally long."""
    batch = make_batch(size=5, **changes)
    masks = {name: torch.tensor(have) for name, have in HAVE.items()}
    real = torch.arange(8) < torch.tensor(WORDS)[:, None]
    return replace(batch, observation=replace(batch.observation, image_masks=masks, token_mask=real))


def alone(batch: Batch, i: int) -> Batch:
    """One sample with its own cameras and no padding."""
    o, a = batch.observation, batch.actions
    cameras = [name for name, have in HAVE.items() if have[i]]
    observation = replace(
        o,
        images={name: o.images[name][i : i + 1] for name in cameras},
        image_masks={name: o.image_masks[name][i : i + 1] for name in cameras},
        state=o.state[i : i + 1],
        tokens=o.tokens[i : i + 1, : WORDS[i]],
        token_mask=o.token_mask[i : i + 1, : WORDS[i]],
    )
    actions = type(a)(*(x[i : i + 1] for x in (a.values, a.is_pad, a.dim_mask)))
    draws = type(flow(batch))(flow(batch).noise[i : i + 1], flow(batch).time[i : i + 1])
    return replace(batch, observation=observation, actions=actions, draws=draws, sample_index=batch.sample_index[:1])


def losses_and_gradients(model: PI0, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = torch.cat([model(batch)["flow"] for batch in batches])
    losses.sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_mixed_batch_computes_what_its_samples_would_alone(draws: int, bfloat16: bool) -> None:
    model, batch = lively_model(), mixed()
    if draws > 1:
        batch = several_pairs(batch, draws)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        losses, gradients = losses_and_gradients(model, [batch])
        expected, theirs = losses_and_gradients(model, [alone(batch, i) for i in range(5)])
    assert relative(losses, expected) < (5e-3 if bfloat16 else 1e-6)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        if not name.endswith("k_proj.bias"):  # zero up to rounding: softmax ignores what all keys share
            assert relative(gradient, theirs[name]) < (5e-2 if bfloat16 else 1e-5), name
    if draws == 1:
        actions = model.sample_actions(batch.observation, batch.draws)
        singly = [model.sample_actions(alone(batch, i).observation, alone(batch, i).draws) for i in range(5)]
        assert relative(actions, torch.cat(singly)) < 1e-5


def test_what_does_not_exist_is_not_computed() -> None:
    model, batch = lively_model(), mixed()
    seen: dict[str, tuple[int, ...]] = {}
    for name in ("vision.layers.0", "language.layers.0"):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: seen.__setitem__(name, tuple(args[0].shape))
        )
    for name, image in batch.observation.images.items():
        image[~batch.observation.image_masks[name]] = torch.nan
    assert torch.isfinite(model(batch)["flow"]).all()
    images = sum(sum(have) for have in HAVE.values())
    assert seen["vision.layers.0"][:2] == (images, PATCHES)
    assert seen["language.layers.0"][:2] == (1, images * PATCHES + sum(WORDS))


def test_equally_long_samples_are_a_dense_batch_whatever_padding_they_came_with() -> None:
    model, batch = lively_model(), make_batch(size=3)
    five = torch.arange(8) < torch.full((3, 1), 5)
    padded = replace(batch, observation=replace(batch.observation, token_mask=five))
    cut = replace(padded.observation, tokens=padded.observation.tokens[:, :5], token_mask=five[:, :5])
    assert torch.equal(model(padded)["flow"], model(replace(padded, observation=cut))["flow"])
    arranged = arrange(padded.observation.parts(), CAMERAS, PATCHES, 8, torch.device("cpu"))
    assert (arranged.packing, arranged.places, arranged.words) == (None, None, 5)
    assert arranged.positions.shape == (1, 3 * PATCHES + 5)


def test_where_tokens_are_and_where_they_come_from() -> None:
    arranged = arrange(Real(HAVE, WORDS), list(HAVE), 2, 8, torch.device("cpu"))
    lengths = [9, 10, 9, 10, 5]
    packing, places, mask, order = arranged.packing, arranged.places, arranged.mask, arranged.order
    assert packing is not None and places is not None and mask is not None and order is not None
    assert packing.lengths.tolist() == sorted(lengths) and packing.boundaries.tolist() == [0, 5, 14, 23, 33, 43]
    assert packing.boundaries.dtype == torch.int32 and packing.longest == 3 * 2 + 8
    assert mask.sum(1).tolist() == lengths == arranged.lengths.flatten().tolist()
    # Each sample's tokens lie behind one another, in order, and each packed token is of exactly one sample.
    assert torch.equal(places[mask].sort().values, torch.arange(sum(lengths)))
    for row, own, length in zip(places, mask, lengths, strict=True):
        assert (row[own].diff() == 1).all() and own[:length].all()
        assert arranged.positions[0, row[own]].tolist() == list(range(length))
    # The images of a camera follow one another, those of all cameras come first, then the words of all samples.
    images, words = 9 * 2, sum(WORDS)
    assert torch.equal(order.sort().values, torch.arange(images + words))
    third = order[places[2][mask[2]]].tolist()  # its first camera is image 2 of the first, its second is 5 + 1
    assert third == [4, 5, 12, 13, *range(images + 3 + 8, images + 3 + 8 + 5)]
    assert [None if rows is None else rows.tolist() for rows in arranged.rows] == [None, [0, 2], [0, 4]]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_operator_for_a_compiler_is_the_same_function(kv_heads: int) -> None:
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([2, 3, 3, 7])
    shapes = [(15, 4, 6), (15, kv_heads, 6), (15, kv_heads, 6)]
    q, k, v = (torch.randn(shape, generator=random, dtype=torch.float64, requires_grad=True) for shape in shapes)
    plain, operator = _by_length(q, k, v, lengths), attend_by_length(q, k, v, lengths)
    ends = torch.from_numpy(np.append(0, np.cumsum(lengths.numpy()))).int()
    apart = [x.transpose(0, 1)[None] for x in (q, k, v)]
    packed = attend(*apart, Packing(ends, lengths, 7))[0]
    weight = torch.randn(plain.shape, generator=random, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (plain, operator, packed)]
    for out, of_inputs in zip((operator, packed), gradients[1:], strict=True):
        torch.testing.assert_close(out, plain)
        for ours, theirs in zip(of_inputs, gradients[0], strict=True):
            torch.testing.assert_close(ours, theirs)
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths.tolist())).bool()
    torch.testing.assert_close(attend(*apart, mask)[0], plain)
