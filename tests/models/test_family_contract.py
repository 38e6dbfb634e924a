"""The same checks over every registered family: what a policy owes to the rest of the program.

Run: uv run pytest tests/models/test_family_contract.py      (half a minute)
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import pytest
import torch
from support import tiny_family
from support.launching import MODEL, with_support
from torch.utils.flop_counter import FlopCounterMode

from agent.batch import ActionChunk, Batch, stack_draws
from agent.checkpoints.weights import account
from agent.data.samples.reader import collate_observation
from agent.deployment.processors import read_processors
from agent.models import registry
from agent.models.base import ModelConfig
from agent.models.common.memory import Training
from agent.models.family import Family
from agent.models.lerobot_config import FeatureSpec, TrainableConfig
from agent.models.policy import Policy

CAMERA, STATE_DIM, ACTION_DIM, SIZE = "observation.images.front", 5, 4, 3
FEATURES = {
    "input_features": {
        CAMERA: {"type": "VISUAL", "shape": [3, 32, 32]},
        "observation.state": {"type": "STATE", "shape": [STATE_DIM]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [ACTION_DIM]}},
}
# A new family writes here a JSON with small sizes.
JSONS: dict[str, dict[str, Any]] = {
    "pi0": MODEL,
    "tiny": {"type": "tiny", "hidden": 12, "chunk_size": 4, "max_state_dim": 8, "max_action_dim": 8},
}


@dataclass
class Subject:
    """A family and a small policy of it."""

    family: Family[Any]
    config: TrainableConfig
    policy: Policy

    @property
    def batch(self) -> Batch:
        """Three samples with a real state, action and picture; one has two padded steps."""
        spec = self.family.sample_spec(self.config)
        generator = torch.Generator().manual_seed(1)
        prompt = self.family.prompt(self.config)
        picture = torch.randint(0, 256, (3, *spec.image_resolution), generator=generator, dtype=torch.uint8)
        state = torch.randn(SIZE, spec.max_state_dim, generator=generator) * (
            torch.arange(spec.max_state_dim) < STATE_DIM
        )
        dim_mask = (torch.arange(spec.max_action_dim) < ACTION_DIM).expand(SIZE, -1)
        is_pad = torch.zeros(SIZE, spec.chunk_size, dtype=torch.bool)
        is_pad[1, -2:] = True
        values = torch.randn(SIZE, spec.chunk_size, spec.max_action_dim, generator=generator) * dim_mask[:, None]
        draw = self.family.draws(self.config, 3, "train")
        return Batch(
            observation=collate_observation(
                [{slot: picture for slot in spec.camera_slots} for _ in range(SIZE)],
                state,
                [list(range(2, 5 + k)) if prompt is not None else [] for k in range(SIZE)],
                spec,
                0,
            ),
            actions=ActionChunk(values, is_pad, dim_mask),
            draws=stack_draws([draw(k) for k in range(SIZE)]),
            sample_index=torch.arange(SIZE),
            provenance=torch.zeros(SIZE, 3, dtype=torch.int64),
        )


known = pytest.fixture(scope="module", autouse=True)(tiny_family.known)


@pytest.fixture(scope="module", params=sorted({*registry.families(), "tiny"}))
def subject(request: pytest.FixtureRequest, known: None) -> Subject:
    assert request.param in JSONS, "write a JSON with small sizes into this file"
    config = draccus.decode(ModelConfig, JSONS[request.param] | FEATURES)
    assert isinstance(config, TrainableConfig)
    family = registry.family(config)
    with torch.device("meta"):
        policy = family.policy(config)
    policy.to_empty(device="cpu")
    policy.init_weights(torch.Generator().manual_seed(0))
    return Subject(family, config, policy)


def test_its_config_knows_what_it_is(subject: Subject) -> None:
    assert isinstance(subject.config, subject.family.config) and subject.config.title
    keys = set(vars(subject.config))
    named = {shared.model for shared in subject.config.shared_keys} | {*subject.config.base_weights}
    named |= {*subject.config.free_on_resume, *subject.config.positive, *subject.config.ours_alone}
    assert named <= keys, f"no such key: {named - keys}"
    assert subject.config.input_features is not None
    assert isinstance(subject.config.input_features["observation.state"], FeatureSpec)


def test_its_losses_have_one_number_per_sample_and_a_weight(subject: Subject) -> None:
    losses = subject.policy(subject.batch)
    assert losses.keys() == subject.policy.loss_weights.keys()
    for loss in losses.values():
        assert (loss.shape, loss.dtype) == ((SIZE,), torch.float32)
    total = sum(weight * losses[name] for name, weight in subject.policy.loss_weights.items())
    torch.testing.assert_close(subject.policy.total(losses), total)


def test_padded_steps_of_a_sample_do_not_reach_the_others(subject: Subject) -> None:
    batch, other = subject.batch, subject.batch
    other.actions.values[1, -2:] += 7.0
    ours, theirs = (subject.policy.total(subject.policy(some)) for some in (batch, other))
    # A flow's noisy actions are an input, so that padded steps may move their own sample's loss.
    torch.testing.assert_close(ours[[0, 2]], theirs[[0, 2]])
    assert torch.isfinite(theirs).all()


def test_every_parameter_is_frozen_or_gets_a_gradient(subject: Subject) -> None:
    subject.policy.zero_grad()
    subject.policy.total(subject.policy(subject.batch)).sum().backward()
    without = {name for name, parameter in subject.policy.named_parameters() if parameter.grad is None}
    assert without <= subject.policy.frozen_parameters().keys()


def test_a_loss_and_an_action_are_functions_of_the_batch_alone(subject: Subject) -> None:
    batch = subject.batch
    with torch.no_grad():
        first, second = (subject.policy.total(subject.policy(batch)) for _ in range(2))
        assert torch.equal(first, second)
        actions, again = (subject.policy.sample_actions(batch.observation, batch.draws) for _ in range(2))
    assert torch.equal(actions, again) and actions.shape == batch.actions.values.shape


def test_its_draws_are_functions_of_seed_purpose_and_number_and_travel(subject: Subject) -> None:
    draw = subject.family.draws(subject.config, 3, "train")
    travelled = pickle.loads(pickle.dumps(draw))
    for k in (0, 7):
        ours, theirs = vars(draw(k)), vars(travelled(k))
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    for other in (subject.family.draws(subject.config, 4, "train"), subject.family.draws(subject.config, 3, "robot")):
        assert all(not np.array_equal(value, vars(other(0))[name]) for name, value in vars(draw(0)).items())


def test_weights_depend_on_the_generator_alone(subject: Subject) -> None:
    with torch.device("meta"):
        other = subject.family.policy(subject.config)
    other.to_empty(device="cpu")
    torch.manual_seed(99)
    other.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in subject.policy.state_dict().items())


def test_its_units_are_its_own_and_hold_what_they_say(subject: Subject) -> None:
    modules = set(subject.policy.modules())
    for units in (subject.policy.wrap_units(), subject.policy.shard_units()):
        assert units and set(units) <= modules
        inner = [one for unit in units for one in unit.modules() if one is not unit]
        assert not set(units) & set(inner), "a unit lies within another"


def test_what_is_saved_loads_again_under_published_names(subject: Subject, tmp_path: Path) -> None:
    saved, names, config = subject.family.saved, subject.family.names, subject.config
    statistics = {
        feature: {name: np.ones(dims, np.float32) for name in ("mean", "std", "min", "max", "q01", "q99", "q10", "q90")}
        for feature, dims in (("observation.state", STATE_DIM), ("action", ACTION_DIM))
    }
    files, write_small = saved.pretrained_contents(config, subject.policy.state_dict(), statistics, 10)
    write_small(tmp_path)
    from safetensors.torch import save_file

    (content,) = files.values()
    save_file({name: tensor.clone().contiguous() for name, tensor in content.items()}, tmp_path / "model.safetensors")
    coverage, _ = account(
        names.shapes(config),
        [tmp_path / "model.safetensors"],
        lambda found: names.from_policy(found, config),
        names.fit,
    )
    assert not coverage.missing and not coverage.fresh and set(coverage.loaded) == set(subject.policy.state_dict())
    assert draccus.decode(ModelConfig, json.loads((tmp_path / "config.json").read_text())).type == config.type
    found = saved.read_statistics([tmp_path / "model.safetensors"], config)
    assert found["state"]["mean"].shape == (STATE_DIM,) and found["action"]["mean"].shape == (ACTION_DIM,)
    processors = read_processors(tmp_path, config, {})
    prompt = subject.family.prompt(config)
    assert (processors.prompt is None) == (prompt is None)
    if prompt is not None and processors.prompt is not None:
        assert processors.prompt.text("open the drawer") == prompt.text("open the drawer")
    assert "lerobot" in saved.formats


def test_its_predicted_cost_is_what_the_network_costs(subject: Subject) -> None:
    family, config, batch = subject.family, subject.config, subject.batch
    subject.policy.zero_grad()
    counter = FlopCounterMode(display=False)
    with counter:
        subject.policy.total(subject.policy(batch)).sum().backward()
    tokens = batch.observation.tokens.shape[1]
    cameras = len(batch.observation.images)
    real = batch.observation.parts()  # neither absent cameras nor padding cost anything
    sizes = [(sum(have[i] for have in real.cameras.values()), count) for i, count in enumerate(real.tokens)]
    expected = sum(family.flop_per_sample(config, *size) for size in sizes)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.1)
    memory = family.memory(config, Training(batch=SIZE, cameras=cameras, language_tokens=tokens, use_bf16=False))
    numbers = sum(parameter.numel() for parameter in subject.policy.parameters())
    assert memory.parameters == 4 * numbers and memory.peak > memory.parameters + memory.optimizer


def test_importing_a_family_imports_no_torch() -> None:
    program = "import sys; from support import tiny_family; tiny_family.register(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=with_support(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
