"""Moments of eight bits and weights of bfloat16: exact where exactness is promised, near enough where it is not.

Run with ``uv run pytest tests/optim/test_low_memory_optimizers.py``; two minutes, most of them real runs of two processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.forked import ForkServer
from support.launching import Workplace
from support.records import recorded, what_was_computed
from torch import Tensor, nn

from agent.optim.adamw8bit import dequantise, dynamic_map, quantise, scale_shape
from agent.optim.low_memory_adamw import LowMemoryAdamW
from agent.optim.optimizer import allocate_state, apply_update, clip_gradients, make_optimizer, optimizer_tensors

BF16 = ("--precision", "bfloat16_stochastic")
BOTH = (*BF16, "--optimizer", "adamw8bit")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- eight bits


def out_and_in(values: Tensor, signed: bool) -> Tensor:
    codes, scale = torch.zeros(values.shape, dtype=torch.uint8), torch.zeros(scale_shape(tuple(values.shape)))
    quantise(values.clone(), codes, scale, signed)
    return dequantise(codes, scale, signed, torch.empty(values.shape), torch.empty(values.numel(), dtype=torch.int32))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 256), (5, 1024), (7, 588), (6, 32), (1, 4304)])
def test_numbers_come_back_as_the_nearest_of_their_block(shape: tuple[int, int], signed: bool) -> None:
    values = random(*shape) * torch.logspace(-3, 2, shape[0])[:, None]
    values = values if signed else values.abs()
    result = out_and_in(values, signed)
    table = torch.tensor(dynamic_map(signed))
    for row, found in zip(values, result, strict=True):
        for block, ours in zip(row.split(256), found.split(256), strict=True):
            largest = block.abs().max()
            error = (block[:, None] - table * largest).abs().min(dim=1).values
            # Nearest up to the precision in which a number is looked up.
            assert ((block - ours).abs() <= error + block.abs() * 2**-10 + 1e-12).all()


def test_the_second_moment_is_never_lost_and_zero_stays_zero() -> None:
    roots = torch.tensor([[1.0, 1e-3, 1e-9, 1e-20, 0.0]]).repeat(1, 60)
    result = out_and_in(roots, signed=False)
    assert (result[roots > 0] > 0).all() and (result[roots == 0] == 0).all()
    assert (out_and_in(torch.zeros(2, 300), signed=True) == 0).all()


def test_rows_are_quantised_as_if_they_were_whole() -> None:
    values = random(6, 700)
    parts = [out_and_in(part, signed=True) for part in values.split([1, 3, 2])]
    assert torch.equal(torch.cat(parts), out_and_in(values, signed=True))


# ---- the optimizer


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(80, 96), nn.Linear(96, 64)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=number) / 9)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).float()


KINDS: dict[str, tuple[bool, torch.dtype]] = {
    "adamw8bit": (True, torch.float32),
    "bfloat16": (False, torch.bfloat16),
    "both": (True, torch.bfloat16),
}


def make(kind: str, lr: float = 3e-3) -> tuple[Model, torch.optim.Optimizer]:
    eight_bit, dtype = KINDS.get(kind, (False, torch.float32))
    model = Model(dtype)
    return model, make_optimizer(
        model, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, eight_bit=eight_bit, seed=5
    )


def train(model: Model, optimizer: torch.optim.Optimizer, updates: range, lr: float = 3e-3) -> list[float]:
    teacher, losses = Model(), []
    for parameter in teacher.parameters():
        parameter.data = random(*parameter.shape, seed=99) / 5
    for update in updates:
        x = random(32, 80, seed=1000 + update)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=next(model.parameters()).dtype == torch.bfloat16):
            loss = (model(x) - teacher(x).detach()).square().mean()
        loss.backward()
        losses.append(loss.item())
        clip_gradients(optimizer, 10.0)
        apply_update(optimizer, lr, update)
        optimizer.zero_grad(set_to_none=True)
    return losses


def test_in_float32_it_is_torchs_adamw() -> None:
    reference, optimizer = make("adamw")
    assert type(optimizer) is torch.optim.AdamW
    model = Model()
    named = list(model.named_parameters())
    ours = LowMemoryAdamW(named, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, eight_bit=False, seed=0)
    train(reference, optimizer, range(20))
    train(model, ours, range(20))
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_converges_as_float32_does(kind: str) -> None:
    ends = []
    for which in ("adamw", kind):
        model, optimizer = make(which)
        losses = [train(model, optimizer, range(u, u + 1), lr=5e-3 * (1 - u / 400))[0] for u in range(400)]
        ends.append(sum(losses[-20:]) / 20)
        assert ends[-1] < losses[0] / 5
    assert ends[1] == pytest.approx(ends[0], rel=0.01)


def test_small_updates_are_not_lost() -> None:
    model, optimizer = make("bfloat16", lr=1e-4)
    with torch.no_grad():
        model.first.weight.fill_(1.0)  # the next bfloat16 below is 1/256 away
    for update in range(100):
        model.first.weight.grad = torch.ones_like(model.first.weight)
        apply_update(optimizer, 1e-4, update)
    # 100 updates of 1e-4 and the weight decay; each weight has gone some steps of 1/256 or none.
    mean = model.first.weight.float().mean().item()
    assert mean == pytest.approx(1 - 100 * 1e-4 * 1.01, abs=1e-3)
    assert len(model.first.weight.unique()) > 2


def test_the_norm_is_that_of_float32_and_clipping_rounds_nothing() -> None:
    model, optimizer = make("both")
    gradients = [random(*p.shape, seed=7 + i).bfloat16() for i, p in enumerate(model.parameters())]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = clip_gradients(optimizer, 0.5)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(torch.cat([g.double().flatten() for g in gradients]).norm()), rel=1e-5)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))  # type: ignore[arg-type]
    apply_update(optimizer, 1e-3, 0)
    moment = optimizer.state[model.first.bias]["exp_avg"]
    assert torch.allclose(moment, 0.1 * gradients[1].float() * (0.5 / (norm + 1e-6)), rtol=1e-5)
    moment.zero_()
    apply_update(optimizer, 1e-3, 1)  # is not clipped
    assert torch.allclose(moment, 0.1 * gradients[1].float(), rtol=1e-5)
    # As torch's clip_grad_norm_ scales where there is hardly a gradient; one below the norm is left as it is.
    for size, most, scale in ((0.0, 1.0, 1.0), (0.0, 5e-7, 0.5), (1e-6, 5e-7, 0.25), (1e-6, 1e-5, 1.0)):
        parameter = model.first.bias
        optimizer.zero_grad(set_to_none=True)
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0] = size
        clip_gradients(optimizer, most)
        assert float(optimizer.gradient_scale) == pytest.approx(scale, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_it_continues_bit_for_bit_after_out_and_in(kind: str, tmp_path: Path) -> None:
    straight, optimizer = make(kind)
    train(straight, optimizer, range(6))
    first, optimizer = make(kind)
    train(first, optimizer, range(3))
    tensors = optimizer_tensors(optimizer, first)
    eight_bit = KINDS[kind][0]
    assert (tensors["exp_avg/first.weight"].dtype == torch.uint8) == eight_bit
    assert tensors["exp_avg/first.bias"].dtype == torch.float32  # a small one
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "optimizer.safetensors")

    second, fresh = make(kind)
    second.load_state_dict(first.state_dict())
    loaded = load_file(tmp_path / "optimizer.safetensors")
    room = allocate_state(fresh, second, {name: (tuple(t.shape), t.dtype) for name, t in loaded.items()})
    for name, tensor in loaded.items():
        room[name].copy_(tensor)
    train(second, fresh, range(3, 6))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_the_state_of_another_optimizer_is_refused() -> None:
    model, optimizer = make("adamw8bit")
    train(model, optimizer, range(1))
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in optimizer_tensors(optimizer, model).items()}
    other, adamw = make("adamw")
    with pytest.raises(ValueError, match="of another kind: .*write the `optimizer` and `precision`"):
        allocate_state(adamw, other, shapes)
    train(other, adamw, range(1))
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in optimizer_tensors(adamw, other).items()}
    with pytest.raises(ValueError, match="of another kind"):
        allocate_state(make("adamw8bit")[1], make("adamw8bit")[0], shapes)


# ---- whole runs


def finished(server: ForkServer, place: Workplace, name: str, *overrides: str, ranks: int = 2) -> list[dict[str, Any]]:
    output = server.start(place, name, *overrides, ranks=ranks, hook="record", **recorded(place, name)).wait()
    assert place.status(name)["state"] == "finished", output
    return place.metrics(name)


def digests(place: Workplace, name: str, rank: int) -> list[tuple[int, str]]:
    lines = (place.folder / f"record-{name}.{rank}").read_text().splitlines()
    return [(record["step"], record["digest"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def through(place: Workplace, server: ForkServer) -> str:
    finished(server, place, "through", *BOTH)
    return "through"


def test_all_ranks_hold_the_same_and_a_killed_run_goes_on_bit_for_bit(
    place: Workplace, through: str, server: ForkServer
) -> None:
    expected = dict(digests(place, through, 0))
    assert digests(place, through, 1) == digests(place, through, 0)
    for kill_at in (6, 13, None):
        run = server.start(place, "killed", *BOTH, ranks=2, hook="record", **recorded(place, "killed"))
        if kill_at is not None:
            run.wait_for_step(kill_at)
            run.kill_all()
    output = run.wait()
    assert place.status("killed")["state"] == "finished", output
    for rank in range(2):
        found = digests(place, "killed", rank)
        assert len(found) > 20 and found == [(step, expected[step]) for step, _ in found]
    assert what_was_computed(place.metrics("killed")) == what_was_computed(place.metrics(through))
    assert place.tensors("killed") == place.tensors(through)


def test_the_checkpoint_is_small_and_of_the_types_that_training_has(place: Workplace, through: str) -> None:
    weights = load_file(place.checkpoint(through) / "pretrained_model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not (place.checkpoint(through) / "training_state" / "model.safetensors").exists()
    state: dict[str, Tensor] = {}
    for path in place.checkpoint(through).glob("training_state/optimizer*.safetensors"):
        state |= load_file(path)
    embedding = {name.split("/")[0]: t for name, t in state.items() if name.endswith("/language.embedding.weight")}
    assert embedding["exp_avg"].dtype == embedding["exp_avg_sq_root"].dtype == torch.uint8
    assert embedding["exp_avg_scale"].shape == (512, 1) and "exp_avg_sq" not in embedding


def test_split_over_processes_it_is_the_same_optimizer(place: Workplace, through: str, server: ForkServer) -> None:
    copies = finished(server, place, "copies", "--optimizer", "adamw8bit")
    for name, ranks, how in (("split", 2, "fsdp"), ("alone", 1, "ddp")):
        lines = finished(server, place, name, "--optimizer", "adamw8bit", "--parallel", how, ranks=ranks)
        for ours, theirs in zip(lines, copies, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    split = finished(server, place, "split both", *BOTH, "--parallel", "fsdp")
    for ours, theirs in zip(split, place.metrics(through), strict=True):
        # Gradients of bfloat16 are added up in float32 by FSDP, and in bfloat16 by DDP.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    # And it is continued with a copy on each process.
    more = finished(server, place, "split both", *BOTH, "--n_updates", "24", "--resume_changes", "true")
    assert [line["step"] for line in more] == list(range(1, 25))


def test_the_losses_stay_near_those_of_float32(place: Workplace, through: str, server: ForkServer) -> None:
    lines = finished(server, place, "float32", "--use_bf16", "true")
    for ours, theirs in zip(place.metrics(through), lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((*BF16, "--use_bf16", "false"), "write use_bf16: true, or precision: float32_master"),
        (("--precision", "bfloat16"), "'bfloat16' is not one of float32_master, bfloat16_stochastic"),
        (("--optimizer", "adam8bit"), "'adam8bit' is not one of adamw, adamw8bit"),
    ],
)
def test_what_is_not_offered_is_refused(
    place: Workplace, server: ForkServer, overrides: tuple[str, ...], said: str
) -> None:
    assert said in server.start(place, "refused", *overrides).wait()


def test_another_optimizer_than_the_checkpoints_is_refused(place: Workplace, through: str, server: ForkServer) -> None:
    changes = ("--n_updates", "24", "--resume_changes", "true")
    assert "optimizer: adamw8bit → adamw" in server.start(place, through, *BF16, ranks=2).wait()
    output = server.start(place, through, *BF16, *changes, ranks=2).wait()
    assert "write the `optimizer` and `precision` that the checkpoint was made with" in output
