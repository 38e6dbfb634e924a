"""Several (noise, time) pairs per observation: one prefix, suffixes that do not see each other.

Run: pytest tests/models/pi/test_flow_samples.py   (under a minute; the runs are real processes)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.forked import ForkServer
from support.launching import Workplace
from support.small_model import CAMERAS, SAMPLING, K, flow, lively_model, make_batch, relative, several_pairs

from agent.batch import Batch
from agent.checkpoints.manifest import MANIFEST, seal
from agent.models.flow_matching import FlowDraws
from agent.models.pi.model import PI0
from agent.parallel.recompute import recompute


def pair(batch: Batch, j: int) -> Batch:
    """The batch with draw ``j`` alone."""
    return replace(batch, draws=FlowDraws(flow(batch).noise[:, j], flow(batch).time[:, j]))


def full_batch(padded: bool) -> Batch:
    """Padded steps in one sample; with ``padded``, padded tokens and an absent camera too."""
    batch = make_batch()
    batch.actions.is_pad[1, 4:] = True
    if padded:
        batch.observation.image_masks[CAMERAS[0]][1] = False
        return batch
    mask = torch.ones_like(batch.observation.token_mask)
    return replace(batch, observation=replace(batch.observation, token_mask=mask))


def loss_and_gradients(model: PI0, *batches: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean over the batches, one pass each."""
    model.zero_grad()
    loss = torch.stack([model(batch)["flow"] for batch in batches]).mean(0)
    loss.mean().backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_k_draws_are_the_mean_of_k_passes(padded: bool, checkpointing: bool) -> None:
    model, batch = lively_model(), several_pairs(full_batch(padded))
    recompute(model.wrap_units(), "full" if checkpointing else "none")
    loss, gradients = loss_and_gradients(model, batch)
    expected, their_gradients = loss_and_gradients(model, *(pair(batch, j) for j in range(K)))
    assert loss.shape == (3,) and relative(loss, expected) < 1e-6
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        if not name.endswith("k_proj.bias"):  # zero up to rounding: softmax ignores what all keys share
            assert relative(gradient, their_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("padded", [False, True])
def test_suffixes_do_not_see_each_other(padded: bool) -> None:
    model, batch = lively_model(), several_pairs(full_batch(padded))
    draws = FlowDraws(flow(batch).noise.clone(), flow(batch).time.clone())
    draws.noise[:, 1] += 1.0
    draws.time[:, 1] *= 0.5
    other = replace(batch, draws=draws)
    errors, changed = model.velocity_errors(batch), model.velocity_errors(other)
    assert errors.shape == draws.noise.shape
    assert torch.equal(errors[:, 0], changed[:, 0]) and torch.equal(errors[:, 2], changed[:, 2])
    assert not torch.equal(errors[:, 1], changed[:, 1])


def test_a_draw_dimension_of_one_changes_no_bit() -> None:
    model, batch = lively_model(), full_batch(True)
    one = replace(batch, draws=FlowDraws(flow(batch).noise[:, None], flow(batch).time[:, None]))
    for ours, theirs in zip(loss_and_gradients(model, one), loss_and_gradients(model, batch), strict=True):
        if isinstance(ours, dict):
            assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())
        else:
            assert torch.equal(ours, theirs)


def test_draws_are_a_function_of_seed_sample_and_number() -> None:
    several = replace(SAMPLING, pairs=K)
    noise, times = several(123).noise, several(123).time
    assert (noise.shape, noise.dtype, times.shape, times.dtype) == ((K, 6, 32), np.float32, (K,), np.float32)
    more = replace(SAMPLING, pairs=K + 2)(123)
    assert np.array_equal(more.noise[:K], noise) and np.array_equal(more.time[:K], times)
    first = SAMPLING(123)
    assert np.array_equal(noise[0], first.noise) and times[0] == first.time
    everything = np.concatenate([several(k).noise.reshape(K, -1) for k in range(50)])
    # No two draws share numbers, nor do draws of the same sample correlate.
    assert len(np.unique(everything[:, 0])) == 50 * K
    assert abs(np.corrcoef(everything) - np.eye(50 * K)).max() < 0.4


SHORT = ("--n_updates", "6", "--eval_freq", "3")


def finished(place: Workplace, server: ForkServer, name: str, *overrides: str, ranks: int = 1) -> list[dict]:
    output = server.start(place, name, *SHORT, *overrides, ranks=ranks).wait()
    assert place.status(name)["state"] == "finished", output
    return place.metrics(name)


def test_the_split_does_not_matter_and_every_draw_counts(place: Workplace, server: ForkServer) -> None:
    four = ("--flow_samples_per_observation", "4")
    alone = finished(place, server, "alone", *four, "--per_device_batch_size", "8")
    split = finished(place, server, "split", *four, ranks=2)  # two micro-batches of two on each
    single = finished(place, server, "single", "--per_device_batch_size", "8")
    for ours, theirs in zip(split, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert alone[0]["loss"] != pytest.approx(single[0]["loss"], rel=1e-3)
    # Validation has one draw per sample, always the same, so that its loss can be compared.
    assert {"val/loss", "val/action_l1"} <= set(alone[-1])


def test_a_resume_continues_k_draws_and_refuses_another_k(place: Workplace, server: ForkServer) -> None:
    two = ("--flow_samples_per_observation", "2", "--save_model_freq", "3")
    through = finished(place, server, "through", *two)
    run = server.start(place, "killed", *SHORT, *two)
    run.wait_for_step(4)
    run.kill_all()
    assert finished(place, server, "killed", *two)[-1]["loss"] == through[-1]["loss"]
    assert place.tensors("killed") == place.tensors("through")
    output = server.start(place, "through", *SHORT, "--flow_samples_per_observation", "3").wait()
    assert "flow_samples_per_observation: 2 → 3" in output


def test_a_checkpoint_older_than_the_key_had_one_draw(place: Workplace, server: ForkServer) -> None:
    finished(place, server, "old")
    config = place.checkpoint("old") / "training_state" / "config.yaml"
    lines = config.read_text().splitlines()
    assert "flow_samples_per_observation: 1" in lines
    config.write_text("\n".join(line for line in lines if not line.startswith("flow_samples")) + "\n")
    (place.checkpoint("old") / MANIFEST).unlink()
    seal(place.checkpoint("old"), 6)
    output = server.start(place, "old", *SHORT, "--n_updates", "8").wait()
    assert "n_updates: 6 → 8" in output and "flow_samples" not in output


@pytest.mark.parametrize("value", ["0", "-2"])
def test_less_than_one_draw_is_refused(place: Workplace, server: ForkServer, value: str) -> None:
    output = server.start(place, "refused", "--flow_samples_per_observation", value).wait()
    assert "flow_samples_per_observation must be at least 1" in output
    assert not (place.folder / "runs" / "refused").exists()
