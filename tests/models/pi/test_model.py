"""π0 against LeRobot's own, shrunk: same weights, same batch, same numbers.

Run: pytest tests/models/pi/test_model.py   (about ten seconds, most of them importing LeRobot)
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.lerobot import lerobot_of
from support.small_model import (
    ACTION_DIM,
    CAMERAS,
    EXPERT,
    LANGUAGE,
    SAMPLING,
    STATE_DIM,
    VISION,
    flow,
    lively_model,
    make_batch,
    relative,
    small_config,
    small_model,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from agent.batch import ActionChunk, Batch, Observation
from agent.describe_config import field_texts
from agent.models.common.attention import attend
from agent.models.common.sizes import GemmaVariant
from agent.models.flow_matching import FlowDraws, FlowSampling, euler, interpolate, per_sample_loss
from agent.models.lerobot_config import FeatureSpec
from agent.models.pi import adapter
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0, prepare_images
from agent.parallel.recompute import recompute

TOLERANCE = 1e-5


def select(batch: Batch, i: int, cameras: list[str]) -> Batch:
    """The i-th sample alone, with these cameras."""
    o, a = batch.observation, batch.actions
    observation = Observation(
        {c: o.images[c][i : i + 1] for c in cameras},
        {c: o.image_masks[c][i : i + 1] for c in cameras},
        *(x[i : i + 1] for x in (o.state, o.tokens, o.token_mask)),
    )
    actions = ActionChunk(*(x[i : i + 1] for x in (a.values, a.is_pad, a.dim_mask)))
    rest = (x[i : i + 1] for x in (batch.sample_index, batch.provenance))
    draws = FlowDraws(flow(batch).noise[i : i + 1], flow(batch).time[i : i + 1])
    return Batch(observation, actions, draws, *rest)


@pytest.fixture(scope="module")
def lerobot():
    """LeRobot's policy class, its sizes those of ``small_config`` while a policy is built."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config as Theirs

    def build(ours: PI0, **changes):
        config = Theirs(
            device="cpu",
            chunk_size=6,
            n_action_steps=6,
            image_resolution=(28, 28),
            num_inference_steps=3,
            input_features={name: PolicyFeature(FeatureType.VISUAL, (3, 28, 28)) for name in CAMERAS}
            | {"observation.state": PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
            output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
            **changes,
        )
        policy = modeling.PI0Policy(config)
        policy.load_state_dict(adapter.to_lerobot(ours.state_dict(), ours.config), strict=True)
        return policy

    with lerobot_of(LANGUAGE, EXPERT, VISION) as (modeling, _):
        yield SimpleNamespace(build=build, modeling=modeling)


def their_inputs(policy, observation: Observation) -> tuple:
    images, masks = policy._preprocess_images(dict(observation.images))
    return images, masks, observation.tokens, observation.token_mask, observation.state


def their_errors(policy, batch: Batch) -> Tensor:
    inputs = their_inputs(policy, batch.observation)
    return policy.model(*inputs, batch.actions.values, flow(batch).noise, flow(batch).time)


CASES = {
    "one camera": {"cameras": CAMERAS[1:2]},
    "two of three cameras": {"cameras": [CAMERAS[2], CAMERAS[0]]},
    "all cameras": {},
    "images of another size": {"image": (30, 41)},
    "tall images": {"image": (61, 17), "cameras": CAMERAS[:1]},
}


@pytest.mark.parametrize(("case", "checkpointing"), [*((case, False) for case in CASES), ("all cameras", True)])
def test_loss_gradients_and_actions_equal_lerobots(lerobot, case, checkpointing):
    ours, batch = lively_model(), make_batch(**CASES[case])
    recompute(ours.wrap_units(), "full" if checkpointing else "none")
    theirs = lerobot.build(ours)

    loss = ours(batch)["flow"]
    loss.mean().backward()
    their_loss = their_errors(theirs, batch)[:, :, :ACTION_DIM].mean((1, 2))
    their_loss.mean().backward()
    deviations = {"loss": relative(loss, their_loss)}

    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    frozen = ours.frozen_parameters()
    for name, parameter in ours.named_parameters():
        their_gradient = their_gradients[adapter.LEROBOT.theirs(name)]
        if name in frozen:
            assert parameter.grad is None and (their_gradient is None or not their_gradient.any()), name
        else:
            deviations[name] = relative(parameter.grad, their_gradient)
            if name.endswith("k_proj.bias"):  # zero up to rounding: softmax ignores what all keys share
                scale = their_gradients[adapter.LEROBOT.theirs(name).replace("bias", "weight")].norm()
                deviations[name] = float((parameter.grad - their_gradient).norm() / scale)

    their_actions = theirs.model.sample_actions(*their_inputs(theirs, batch.observation), noise=flow(batch).noise)
    deviations["actions"] = relative(ours.sample_actions(batch.observation, batch.draws), their_actions)
    worst = max(deviations, key=deviations.get)
    gradient = max(v for k, v in deviations.items() if k not in ("loss", "actions"))
    print(f"{case}: loss {deviations['loss']:.1e}, gradients {gradient:.1e}, actions {deviations['actions']:.1e}")
    assert deviations[worst] < TOLERANCE, (worst, deviations[worst])


def test_padded_steps_and_dimensions_do_not_change_the_errors_but_leave_the_loss(lerobot):
    ours, batch = lively_model(), make_batch()
    is_pad = torch.zeros(3, 6, dtype=torch.bool)
    is_pad[1, 4:] = True
    batch = replace(batch, actions=replace(batch.actions, is_pad=is_pad))
    errors = ours.velocity_errors(batch)
    assert relative(errors, their_errors(lerobot.build(ours), batch)) < TOLERANCE
    expected = torch.stack([errors[0, :, :7].mean(), errors[1, :4, :7].mean(), errors[2, :, :7].mean()])
    torch.testing.assert_close(ours(batch)["flow"], expected)


def test_a_sample_without_a_camera_equals_that_sample_alone():
    model, batch = lively_model(), make_batch()
    batch.observation.image_masks[CAMERAS[0]][1] = False
    alone = torch.cat([model(select(batch, i, CAMERAS[1:] if i == 1 else CAMERAS))["flow"] for i in range(3)])
    assert relative(model(batch)["flow"], alone) < TOLERANCE
    actions = model.sample_actions(batch.observation, batch.draws)
    one = select(batch, 1, CAMERAS[1:])
    assert relative(actions[1:2], model.sample_actions(one.observation, one.draws)) < TOLERANCE


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_attention_shares_key_value_heads(kv_heads):
    queries, keys, values = torch.randn(2, 8, 5, 4), torch.randn(2, kv_heads, 6, 4), torch.randn(2, kv_heads, 6, 4)
    mask = torch.rand(2, 1, 5, 6) < 0.5
    mask[..., 0] = True
    scores = queries @ keys.repeat_interleave(8 // kv_heads, 1).transpose(2, 3) / 2
    values_all = values.repeat_interleave(8 // kv_heads, 1)
    for seen in (mask, None):
        weights = (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)
        expected = (weights @ values_all).transpose(1, 2).reshape(2, 5, 32)
        torch.testing.assert_close(attend(queries, keys, values, seen), expected)


@pytest.mark.parametrize(("dtype", "masked"), [("float32", False), ("float32", True), ("bfloat16", True)])
def test_on_a_gpu_shared_heads_leave_a_fused_kernel(monkeypatch, dtype, masked):
    # enable_gqa "works only for Flash_attention and math kernel on CUDA tensor", and flash knows neither of these.
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *arguments, **options: (seen.append((arguments[1], options)), kernel(*arguments, **options))[1],
    )
    with FakeTensorMode(), torch.device("cuda"):
        queries = torch.empty(2, 8, 5, 16, dtype=getattr(torch, dtype))
        keys, mask = queries[:, :1], torch.ones(2, 1, 1, 5, dtype=torch.bool) if masked else None
        assert attend(queries, keys, keys, mask).shape == (2, 5, 128)
    ((given, options),) = seen
    assert options["enable_gqa"] is False and given.shape[1] == 8
    assert given.stride(1) == 0  # repeated, not copied


def test_uint8_images_equal_float_ones():
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(prepare_images(images, (28, 28)), prepare_images(images / 255, (28, 28)))
    assert prepare_images(images, (28, 28)).dtype == torch.float32


@pytest.mark.parametrize("size", [(480, 640), (37, 91), (224, 224), (100, 20), (3, 300)])
def test_images_are_prepared_as_lerobot_does(lerobot, size):
    images = torch.rand(1, 3, *size)
    config = SimpleNamespace(image_features={"a": None}, image_resolution=(224, 224))
    policy = SimpleNamespace(parameters=lambda: iter([images]), config=config)
    (theirs,), _ = lerobot.modeling.PI0Policy._preprocess_images(policy, {"a": images})
    assert torch.equal(prepare_images(images, (224, 224)), theirs)


FREEZING = [
    {},
    {"train_expert_only": True},
    {"freeze_vision_encoder": True},
    {"freeze_lm_head": True},
    {"freeze_vision_encoder": True, "train_expert_only": True, "freeze_lm_head": True},
    {"input_features": {"observation.state": FeatureSpec("STATE", [STATE_DIM])}, "empty_cameras": 1},
]


@pytest.mark.parametrize("changes", FREEZING, ids=lambda changes: "+".join(changes) or "nothing")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_is_either_frozen_or_gets_a_gradient(changes, checkpointing):
    model = small_model(**changes)
    recompute(model.wrap_units(), "full" if checkpointing else "none")
    frozen = model.frozen_parameters()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    batch = make_batch(cameras=[] if "input_features" in changes else CAMERAS)
    model(batch)["flow"].mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
        assert parameter.grad is None or parameter.grad.any() or name.endswith("k_proj.bias"), name


def test_what_is_frozen():
    def groups(**changes) -> set[str]:
        frozen = small_model(**changes).frozen_parameters()
        return {name.split(".")[0] for name in frozen} | {reason for reason in frozen.values() if " " not in reason}

    assert groups() == {"language"}
    assert groups(freeze_vision_encoder=True) == {"vision", "language", "freeze_vision_encoder"}
    assert groups(train_expert_only=True) == {"vision", "projector", "language", "train_expert_only"}
    embedding = small_model(freeze_lm_head=True).frozen_parameters()["language.embedding.weight"]
    assert embedding == "freeze_lm_head"


def test_frozen_parts_are_lerobots(lerobot):
    for changes in ({"train_expert_only": True}, {"freeze_vision_encoder": True}):
        ours = small_model(**changes)
        theirs = {name for name, p in lerobot.build(ours, **changes).named_parameters() if not p.requires_grad}
        names = {adapter.LEROBOT.theirs(name) for name in ours.frozen_parameters()}
        unreached = {adapter.LEROBOT.theirs(name) for name in small_model().frozen_parameters()}
        assert theirs - names <= {"model.paligemma_with_expert.paligemma.lm_head.weight"}
        assert names - theirs <= unreached


def test_initial_weights_depend_on_the_seed_alone():
    first, second, other = small_model(3), small_model(3), small_model(4)
    with torch.device("meta"):
        meta = PI0(small_config())
    meta.to_empty(device="cpu")
    for parameter in meta.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    meta.init_weights(torch.Generator().manual_seed(3))
    for name, value in first.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second.state_dict()[name]) and torch.equal(value, meta.state_dict()[name]), name
    assert not torch.equal(first.projector.weight, other.projector.weight)
    assert not list(first.buffers())


def test_mixed_precision_is_close():
    model, batch = lively_model(), make_batch()
    exact = model(batch)["flow"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch)["flow"]
    rough.mean().backward()
    assert rough.dtype == torch.float32
    assert relative(rough, exact) < 2e-2
    assert model.action_in_proj.weight.grad.dtype == torch.float32


def test_all_cameras_are_one_call_of_the_vision_tower_in_mixed_precision():
    model, seen = lively_model(), []

    def record(module, inputs, output):
        seen.append((tuple(inputs[0].shape), inputs[0].dtype, output.dtype))

    for module in model.vision.layers[0].modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(record)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(make_batch())
    assert len(seen) == 6 and {shape[:2] for shape, _, _ in seen} == {(3 * len(CAMERAS), 4)}
    assert {dtype for _, *dtypes in seen for dtype in dtypes} == {torch.bfloat16}


def test_parameters_are_float32_whatever_the_training_precision():
    assert {p.dtype for p in small_model(dtype="bfloat16").parameters()} == {torch.float32}


def test_a_batch_that_does_not_fit_is_refused():
    model = small_model()
    with pytest.raises(AssertionError, match="no image"):
        model(make_batch(cameras=[]))
    with pytest.raises(AssertionError, match=r"observation\.images\.wrist"):
        model(make_batch(cameras=["observation.images.wrist"]))


def test_wrap_units_are_all_layers():
    assert len(small_model().wrap_units()) == VISION["depth"] + LANGUAGE["depth"] + EXPERT["depth"]


# ---- flow matching


def drawn(sampling: FlowSampling, k: int) -> tuple[np.ndarray, np.float32]:
    draws = sampling(k)
    return draws.noise, draws.time


def test_draws_are_a_function_of_their_arguments():
    (noise, time), (again, same_time) = drawn(SAMPLING, 123), drawn(SAMPLING, 123)
    assert np.array_equal(noise, again) and time == same_time
    assert noise.dtype == np.float32 and noise.shape == (6, 32) and isinstance(time, np.float32)
    others = [
        drawn(SAMPLING, 124),
        drawn(replace(SAMPLING, seed=8), 123),
        drawn(replace(SAMPLING, purpose="val"), 123),
    ]
    assert all(not np.array_equal(noise, other) and time != t for other, t in others)
    assert drawn(replace(SAMPLING, shape=(50, 32)), 123)[1] == time


def test_draws_have_the_right_distribution():
    draws = [drawn(replace(SAMPLING, seed=0, shape=(10, 8)), k) for k in range(4000)]
    noise, times = np.stack([n for n, _ in draws]), np.array([t for _, t in draws])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(times.mean() - (0.6 * 0.999 + 0.001)) < 0.015 and 0 < times.min() < times.max() <= 1


def test_flow_runs_from_noise_to_action():
    actions, noise = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    at_action, velocity = interpolate(actions, noise, torch.tensor([0.0, 0.0]))
    at_noise, _ = interpolate(actions, noise, torch.tensor([1.0, 1.0]))
    assert torch.equal(at_action, actions) and torch.equal(at_noise, noise)
    # The exact velocity of a straight line takes Euler to its end in any number of steps.
    for steps in (1, 7):
        torch.testing.assert_close(euler(lambda x, t: velocity, noise, steps), actions, rtol=1e-4, atol=1e-5)


def test_a_sample_without_any_real_step_is_not_silent():
    errors, dims = torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)
    is_pad = torch.tensor([[False, True, True], [True, True, True]])
    loss = per_sample_loss(errors, is_pad, dims)
    assert loss[0] == 1 and loss[1].isnan()


def test_drawing_and_configuring_need_no_torch():
    modules = "agent.models.flow_matching, agent.models.pi.configuration"
    code = f"import sys, {modules}; assert not {{'torch', 'transformers', 'lerobot'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- configuration


def test_every_field_of_lerobots_configuration_is_here_with_its_default():
    from lerobot.policies.pi0.configuration_pi0 import PI0Config as Theirs

    ours, theirs = PI0Config(), Theirs(device="cpu")
    stated = {"device", "n_action_steps", "scheduler_decay_steps"}  # null, meaning what the text says
    for name in (f.name for f in fields(Theirs)):
        assert name in {f.name for f in fields(PI0Config)}, name
        if name not in stated:
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.action_steps == theirs.n_action_steps


def test_every_field_is_documented():
    texts = field_texts(PI0Config)
    assert [f.name for f in fields(PI0Config) if not texts.get(f.name)] == []


REFUSED = {
    "n_obs_steps": 2,
    "use_amp": True,
    "use_peft": True,
    "rtc_config": {"enabled": True},
    "dtype": "float16",
    "n_action_steps": 51,
    "empty_cameras": -1,
    "image_resolution": (224, 225),
    "paligemma_variant": "gemma_3b",
    "action_expert_variant": GemmaVariant(64, 3, 96, 8, 1, 16),
    "vision_variant": "so500m",
    "normalization_mapping": {"VISUAL": "MEAN_STD"},
    "input_features": {"observation.environment_state": FeatureSpec("ENV", [3])},
    "output_features": {"action": FeatureSpec("ACTION", [33])},
    "pretrained_revision": "main",
    "chunk_size": 0,
    "max_period": 0.001,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_supported_is_refused_by_name(key):
    with pytest.raises(ValueError, match="min_period|" + key):
        PI0Config(**{key: REFUSED[key]})


def test_normalizations_and_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"normalization_mapping\.STATE.*MEAN_STD"):
        PI0Config(normalization_mapping={"STATE": "MEANSTD"})
    with pytest.raises(ValueError, match="image_resolution"):
        PI0Config(image_resolution=(225, 225))
    with pytest.raises(ValueError, match="write gemma_2b"):
        PI0Config(paligemma_variant="gemma2b")


def test_camera_slots_and_dimensions():
    config = small_config(empty_cameras=2)
    empty = [f"observation.images.empty_camera_{i}" for i in range(2)]
    assert config.camera_slots == CAMERAS + empty
    assert (config.state_dim, config.action_dim) == (STATE_DIM, ACTION_DIM)
    assert (PI0Config().state_dim, PI0Config(input_features=None).camera_slots) == (None, [])
    # A config.json of LeRobot's lists the empty cameras among the features as well.
    features = config.to_lerobot()["input_features"]
    again = small_config(empty_cameras=2, input_features={k: FeatureSpec(**v) for k, v in features.items()})
    assert again.camera_slots == config.camera_slots
