"""What a π0 costs, against what its passes allocate: the full model's, in torch's fake tensors that hold no numbers.

Run: pytest tests/models/pi/test_accounting.py   (half a minute)
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agent.batch import ActionChunk, Batch, Observation, Real, to_device
from agent.models.common import gemma, siglip
from agent.models.common.memory import Training
from agent.models.common.sizes import GEMMA, VISION, GemmaVariant, VisionVariant
from agent.models.flow_matching import FlowDraws
from agent.models.lerobot_config import FeatureSpec
from agent.models.pi.accounting import flop_by_part, flop_per_sample
from agent.models.pi.configuration import PI0Config
from agent.models.pi.memory import predict
from agent.models.pi.model import PI0
from agent.optim.optimizer import apply_update, clip_gradients, freeze, make_optimizer, optimizer_tensors
from agent.parallel import sharding
from agent.parallel.recompute import recompute

TERA = 1e12
A_THIRD: dict[str, Any] = {
    "paligemma_variant": replace(GEMMA["gemma_2b"], depth=6),
    "action_expert_variant": replace(GEMMA["gemma_300m"], depth=6),
    "vision_variant": replace(VISION["so400m"], depth=9),
}


# ---- arithmetic


def test_a_sample_of_three_cameras_takes_11_5_teraflop_and_one_of_one_camera_3_9() -> None:
    config = PI0Config()
    assert flop_per_sample(config, 3) == pytest.approx(11.5 * TERA, rel=0.01)
    # An instruction of 24 tokens, padded no further; with all 48 tokens it is 4.2.
    assert flop_per_sample(config, 1, language_tokens=24) == pytest.approx(3.9 * TERA, rel=0.02)
    assert flop_per_sample(config, 1) == pytest.approx(4.2 * TERA, rel=0.01)
    # 6 × parameters × tokens, of the three parts.
    parts = flop_by_part(config, 3)
    assert parts["language"] == pytest.approx(6 * 1.87e9 * 816, rel=0.005)
    assert parts["vision"] == pytest.approx(6 * 0.41e9 * 768, rel=0.015)
    assert parts["expert"] == pytest.approx(6 * 0.31e9 * 51, rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [{}, {"freeze_vision_encoder": True}, {"train_expert_only": True}],
    ids=lambda changes: "+".join(changes) or "all trained",
)
@pytest.mark.parametrize(("cameras", "draws"), [(1, 1), (2, 1), (2, 3)])
def test_the_flop_are_those_of_the_passes(changes: dict[str, Any], cameras: int, draws: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = small(**changes)
    policy, batch = PI0(config), make_batch(config, cameras, 2, draws)
    policy.init_weights(torch.Generator().manual_seed(0))
    freeze(policy, policy.frozen_parameters())
    with FlopCounterMode(display=False) as counter:
        policy(batch)["flow"].sum().backward()
    parts = flop_by_part(config, cameras, draws=draws)
    products = sum(flop for name, flop in parts.items() if "attention" not in name)
    # The counter does not know the CPU's attention kernel, so that this is about the products with parameters alone.
    assert counter.get_total_flops() == pytest.approx(2 * products, rel=0.02)


# ---- memory


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that still live; and the most there have been."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def resized(self, tensor: Tensor) -> None:
        """For one whose memory was given back or taken anew, which no operation shows."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self.forget, storage._cdata)
        self.now += storage.nbytes() - self.sizes.get(storage._cdata, 0)
        self.sizes[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The path of ``attend`` on a GPU; on a CPU it computes bfloat16 otherwise."""
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1 and (mask is not None or queries.dtype == torch.float32):
        keys, values = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (keys, values))
        groups = 1
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=groups > 1)
    return out.transpose(1, 2).flatten(2)


def passes(config: PI0Config, training: Training, prepare: Any = lambda policy: None) -> tuple[int, int]:
    """Bytes alive after the last forward pass, and the most of all passes; weights and batch not counted."""
    stochastic = training.precision == "bfloat16_stochastic"
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = PI0(config)
        if stochastic:
            for module in policy.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    module.register_parameter(name, torch.nn.Parameter(parameter.detach().to(torch.bfloat16)))
        freeze(policy, policy.frozen_parameters())
        prepare(policy)
        recompute(policy.wrap_units(), training.activation_checkpointing)
        batch = make_batch(config, training.cameras, training.batch, training.draws)
        parameters = [sharding.rows(parameter).local for parameter in policy.parameters()]
        given = [*parameters, *batch.observation.images.values(), batch.draws.noise, batch.actions.values]
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if training.use_bf16 else contextlib.nullcontext()
        with Live(given) as live, following_shards(live):
            for _ in range(2 if training.accumulates else 1):
                with autocast:
                    losses = policy(batch)["flow"]
                kept = live.now
                losses.sum().backward()
    return kept, live.peak


@contextlib.contextmanager
def following_shards(live: Live) -> Iterator[None]:
    """FSDP gives the memory of gathered weights back under its tensors' feet."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("alloc_storage", "free_storage"):
            plain = getattr(_fsdp_param, name)

            def noted(tensor: Tensor, plain: Any = plain) -> None:
                plain(tensor)
                live.resized(tensor)

            patch.setattr(_fsdp_param, name, noted)
        yield


@pytest.fixture
def four() -> Iterator[None]:
    """This process is the first of four, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def attend_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gemma, siglip):
        monkeypatch.setattr(module, "attend", fused_attention)


# Whether a third of the layers has to do: they are all alike, and a full model's passes take long.
SETTINGS = [
    (True, Training(batch=4, cameras=2, activation_checkpointing=recomputed, precision=precision))
    for recomputed in ("none", "blocks", "full")
    for precision in ("float32_master", "bfloat16_stochastic")
] + [
    (True, Training(batch=1, cameras=1, activation_checkpointing="none", use_bf16=False)),
    (False, Training(batch=4, cameras=2, activation_checkpointing="none")),
    (False, Training(batch=8, cameras=3, activation_checkpointing="blocks")),
    (True, Training(batch=16, cameras=1, activation_checkpointing="full", draws=4)),
]


@pytest.mark.parametrize(("third", "training"), SETTINGS, ids=str)
def test_the_predicted_peak_is_within_a_tenth(monkeypatch: pytest.MonkeyPatch, third: bool, training: Training) -> None:
    attend_as_on_a_gpu(monkeypatch)
    config = PI0Config(**features(224), **(A_THIRD if third else {}), freeze_lm_head=True)
    kept, peak = passes(config, training)
    memory = predict(config, training)
    mine = memory.peak - memory.parameters - memory.optimizer
    copies = kept - memory.activations
    print(f"{training}: kept {kept >> 20} MiB, predicted {memory.activations >> 20}; peak {peak >> 20}, {mine >> 20}")
    if not (training.activation_checkpointing == "none" and training.precision == "float32_master"):
        assert memory.activations == pytest.approx(kept, rel=0.1)  # there, copies of the weights are kept too
    else:
        assert copies > 0
    assert mine == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("batch, cameras", [(256, 3), (32, 1)])
def test_the_predicted_peak_beside_what_is_frozen(monkeypatch: pytest.MonkeyPatch, batch: int, cameras: int) -> None:
    """No gradient needs what a frozen layer computes, but the pass through it has it in hand."""
    attend_as_on_a_gpu(monkeypatch)
    config = PI0Config(**features(224), train_expert_only=True)
    training = Training(batch, cameras, activation_checkpointing="full")
    _, peak = passes(config, training)
    memory = predict(config, training)
    assert memory.peak - memory.parameters - memory.optimizer == pytest.approx(peak, rel=0.1)


SHARDED = [
    (True, Training(batch=32, cameras=1, activation_checkpointing="none", shards=4)),
    (True, Training(batch=4, cameras=2, activation_checkpointing="blocks", accumulates=True, shards=4)),
    (False, Training(batch=32, cameras=3, activation_checkpointing="full", precision="bfloat16_stochastic", shards=4)),
]


@pytest.mark.parametrize(("third", "training"), SHARDED, ids=str)
def test_the_predicted_peak_of_a_share_is_within_a_tenth(
    monkeypatch: pytest.MonkeyPatch, four: None, third: bool, training: Training
) -> None:
    attend_as_on_a_gpu(monkeypatch)
    mesh = device_mesh.init_device_mesh("cpu", (4,))  # by itself it computes with ranks, which fake tensors cannot
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *_: mesh)
    processes: Any = SimpleNamespace(device=torch.device("cpu"), world_size=4)
    config = PI0Config(**features(224), **(A_THIRD if third else {}), freeze_lm_head=True)
    _, peak = passes(config, training, lambda policy: sharding.shard(policy, processes, torch.bfloat16))
    memory = predict(config, training)
    mine = memory.peak - memory.parameters - memory.optimizer
    print(f"{training}: peak {peak >> 20} MiB, predicted {mine >> 20}")
    assert mine == pytest.approx(peak, rel=0.1)
    assert 4 * memory.optimizer == pytest.approx(predict(config, replace(training, shards=1)).optimizer)


@pytest.mark.parametrize("eight_bit", [False, True], ids=["adamw", "adamw8bit"])
@pytest.mark.parametrize("changes", [{}, {"freeze_lm_head": True}, {"train_expert_only": True}], ids=str)
def test_weights_gradients_and_state_are_counted_exactly(changes: dict[str, Any], eight_bit: bool) -> None:
    config = small(**changes)
    policy = PI0(config)
    policy.init_weights(torch.Generator().manual_seed(0))
    freeze(policy, policy.frozen_parameters())
    optimizer = make_optimizer(
        policy, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, eight_bit=eight_bit, seed=0
    )
    policy(make_batch(config, 2, 1, 1))["flow"].sum().backward()
    clip_gradients(optimizer, 1.0)
    apply_update(optimizer, 1e-3, 0)
    memory = predict(config, Training(1, 2, optimizer="adamw8bit" if eight_bit else "adamw"))
    assert memory.parameters == sum(p.nbytes for p in policy.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    state = optimizer_tensors(optimizer, policy)
    assert memory.optimizer == sum(tensor.nbytes for name, tensor in state.items() if not name.startswith("step/"))


def test_a_full_fine_tune_fits_a_card_of_24_gb() -> None:
    config = PI0Config(**features(224), freeze_lm_head=True)
    training = Training(4, 2, None, 1, "full", "adamw8bit", "bfloat16_stochastic")
    assert predict(config, training).card < 23.5 * 2**30
    assert predict(config, Training(4, 2)).card > 40 * 2**30


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="optimizer: 'sgd' is unknown; write adamw or adamw8bit"):
        predict(PI0Config(), Training(1, 1, optimizer="sgd"))


def features(side: int) -> dict[str, Any]:
    cameras = {f"observation.images.{i}": FeatureSpec("VISUAL", [3, side, side]) for i in range(3)}
    return {
        "input_features": cameras | {"observation.state": FeatureSpec("STATE", [8])},
        "output_features": {"action": FeatureSpec("ACTION", [7])},
    }


def small(**changes: Any) -> PI0Config:
    language = {"width": 64, "depth": 3, "mlp_dim": 192, "heads": 8, "kv_heads": 1, "head_dim": 16, "vocab_size": 128}
    return PI0Config(
        paligemma_variant=GemmaVariant(**language),
        action_expert_variant=GemmaVariant(**(language | {"width": 48, "mlp_dim": 96})),
        vision_variant=VisionVariant(width=32, depth=2, mlp_dim=80, heads=4, patch_size=14),
        image_resolution=(56, 56),
        chunk_size=6,
        tokenizer_max_length=8,
        **features(56),
        **changes,
    )


def make_batch(config: PI0Config, cameras: int, size: int, draws: int) -> Batch:
    names, chunk = [f"observation.images.{i}" for i in range(cameras)], (config.chunk_size, config.max_action_dim)
    several = (draws,) if draws > 1 else ()
    batch = Batch(
        observation=Observation(
            images={name: torch.zeros(size, 3, *config.image_resolution, dtype=torch.uint8) for name in names},
            image_masks={name: torch.ones(size, dtype=torch.bool) for name in names},
            state=torch.zeros(size, config.max_state_dim),
            tokens=torch.ones(size, config.tokenizer_max_length, dtype=torch.int64),
            token_mask=torch.ones(size, config.tokenizer_max_length, dtype=torch.bool),
            real=Real({name: [True] * size for name in names}, [config.tokenizer_max_length] * size),
        ),
        actions=ActionChunk(
            values=torch.zeros(size, *chunk),
            is_pad=torch.zeros(size, config.chunk_size, dtype=torch.bool),
            dim_mask=torch.ones(size, config.max_action_dim, dtype=torch.bool),
        ),
        draws=FlowDraws(torch.zeros(size, *several, *chunk), torch.full((size, *several), 0.5)),
        sample_index=torch.arange(size),
        provenance=torch.zeros(size, 3, dtype=torch.int64),
    )
    return to_device(batch, "cpu")
