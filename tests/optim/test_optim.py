"""The learning rate against LeRobot's, the freeze table, the optimizer's state out and in.

Run: pytest tests/optim/test_optim.py   (a few seconds, most of them importing LeRobot)
"""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import nn

from agent.checkpoints import tensor_file
from agent.checkpoints.store import TRAINING
from agent.optim.learning_rate import LearningRate
from agent.optim.optimizer import allocate_state, freeze, make_optimizer, optimizer_tensors
from agent.training import saving

PEAK, FINAL = 5e-5, 2.5e-6


@pytest.mark.parametrize("n_updates", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("decay", [1, 30, 100, 999, 1000, 30_000])
@pytest.mark.parametrize("warmup", [0, 1, 5, 99, 1000])
def test_the_learning_rate_is_lerobots(warmup, decay, n_updates):
    from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig

    ours = LearningRate.plan(PEAK, FINAL, warmup, decay, n_updates, "first_update")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    their_config = CosineDecayWithWarmupSchedulerConfig(
        num_warmup_steps=warmup, num_decay_steps=decay, peak_lr=PEAK, decay_lr=FINAL
    )
    (theirs,) = their_config.build(optimizer, n_updates).lr_lambdas
    scaled = int(warmup * n_updates / decay) if n_updates < decay else warmup
    if scaled >= n_updates:  # here LeRobot never leaves the warm-up
        assert ours.warmup_updates == n_updates // 10
        return
    for update in range(n_updates + 5):
        assert ours.at(update) == pytest.approx(PEAK * theirs(update), rel=1e-12), update


@pytest.mark.parametrize(
    ("warmup", "decay", "n_updates"), [(0, 10, 10), (1, 30, 50), (200, 600, 600), (1000, 30_000, 100)]
)
def test_the_cosine_begins_at_the_peak_when_the_warm_up_ends(warmup, decay, n_updates):
    """As openpi's: optax's ``warmup_cosine_decay_schedule`` is torch's linear and cosine schedule one after the other."""
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    ours = LearningRate.plan(PEAK, FINAL, warmup, decay, n_updates)
    assert ours.at(ours.warmup_updates) == PEAK
    if n_updates < decay:  # shortened to the run, in proportion
        warmup, decay = warmup * n_updates // decay, n_updates
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    rising = [LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)] if warmup else []
    falling = CosineAnnealingLR(optimizer, T_max=decay - warmup, eta_min=FINAL)
    theirs = SequentialLR(optimizer, [*rising, falling], milestones=[warmup]) if rising else falling
    for update in range(decay):
        assert ours.at(update) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9), update
        optimizer.step()
        theirs.step()
    assert ours.at(decay) == ours.at(decay + 100) == FINAL
    steepest = max(abs(ours.at(update + 1) - ours.at(update)) for update in range(ours.warmup_updates, decay))
    assert steepest <= PEAK * math.pi / 2 / (decay - ours.warmup_updates)


def test_a_warm_up_that_leaves_nothing_to_the_decay_is_cut():
    for warmup in (50, 80):
        rate = LearningRate.plan(PEAK, FINAL, warmup, 50, 1000)
        assert (rate.warmup_updates, rate.at(5), rate.at(50)) == (5, PEAK, FINAL)


@pytest.mark.parametrize("start", ["after_warmup", "first_update"])
@pytest.mark.parametrize(("warmup", "n_updates"), [(0, 1), (0, 10), (3, 10), (200, 1000), (1000, 100)])
def test_without_a_decay_the_cosine_ends_with_the_run(warmup, n_updates, start):
    rate = LearningRate.plan(PEAK, FINAL, warmup, None, n_updates, start)
    assert rate.at(n_updates) == FINAL == rate.at(10 * n_updates)
    rates = [rate.at(update) for update in range(n_updates + 1)]
    top = rate.warmup_updates
    assert top < n_updates and max(rates) <= PEAK and min(rates[top:-1]) > FINAL
    assert all(a < b for a, b in zip(rates[:top], rates[1:top], strict=False))
    assert all(a > b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    # One update before the end: within what a cosine still has to go there.
    assert rates[-2] - FINAL <= (PEAK - FINAL) * (math.pi / 2 / (n_updates - top)) ** 2 * 1.0001
    same = LearningRate.plan(PEAK, FINAL, warmup, n_updates, n_updates, start)
    assert rates == [same.at(update) for update in range(n_updates + 1)]


def test_the_schedule_is_described():
    assert LearningRate.plan(5e-5, 2.5e-6, 20, None, 100).describe() == (
        "learning rate: 20 updates of warm-up to 5e-05, cosine from there to 2.5e-06 at update 100"
    )
    assert LearningRate.plan(5e-5, 2.5e-6, 20, None, 100, "first_update").describe() == (
        "learning rate: 20 updates of warm-up to 5e-05, where it falls to 4.55e-05 at once, cosine counted from the first "
        "update to 2.5e-06 at update 100"
    )
    assert "2 updates of warm-up" in LearningRate.plan(5e-5, 2.5e-6, 20, 1000, 100).describe()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.vision = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
        self.expert = nn.Linear(5, 3)
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        return self.head(self.expert(self.vision(x)))


FROZEN = {"vision.0.weight": "freeze_vision", "vision.0.bias": "freeze_vision", "head.weight": "the loss never reaches"}


def make(frozen: dict[str, str] | None = None) -> tuple[Model, torch.optim.Optimizer]:
    model = Model()
    freeze(model, FROZEN if frozen is None else frozen)
    return model, make_optimizer(model, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def restore_optimizer(optimizer: torch.optim.Optimizer, model: Model, tensors: dict[str, torch.Tensor]) -> None:
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name, room in allocate_state(optimizer, model, shapes).items():
        room.copy_(tensors[name])


def train(model: Model, optimizer: torch.optim.Optimizer, updates: range) -> None:
    for update in updates:
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(update))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_every_parameter_is_counted_once_as_trained_or_frozen():
    model = Model()
    table = freeze(model, FROZEN)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(FROZEN)
    rows = {}
    for line in table.splitlines()[1:]:
        words = line.split()
        rows[(" ".join(words[:-5]), words[-5])] = (int(words[-4]), round(float(words[-2]) * 1e6))
    # The table shows millions with three digits: what is this small shows as zero, the tensors are exact.
    assert {key: tensors for key, (tensors, _) in rows.items()} == {
        ("trained", "vision"): 2,
        ("trained", "expert"): 2,
        ("freeze_vision", "vision"): 2,
        ("the loss never reaches", "head"): 1,
    }
    assert list(rows)[0][0] == "trained" and sum(tensors for tensors, _ in rows.values()) == len(
        list(model.parameters())
    )


def test_the_freeze_table_counts_numbers_in_millions():
    model = nn.ModuleDict({"a": nn.Linear(1000, 1500, bias=False), "b": nn.Linear(500, 1000, bias=False)})
    lines = freeze(model, {"b.weight": "frozen here"}).splitlines()
    assert lines[0] == "parameters:" and len(lines) == 3
    assert lines[1].split() == ["trained", "a", "1", "tensors", "1.500", "M"]
    assert lines[2].split() == ["frozen", "here", "b", "1", "tensors", "0.500", "M"]


def test_freezing_again_thaws_what_is_not_named():
    model = Model()
    freeze(model, FROZEN)
    freeze(model, {"head.weight": "only this"})
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]


def test_nothing_left_to_train_and_unknown_names_are_refused():
    model = Model()
    with pytest.raises(ValueError, match="every parameter is frozen"):
        freeze(model, {name: "all" for name, _ in model.named_parameters()})
    with pytest.raises(AssertionError, match="does not have.*visoin"):
        freeze(model, {"visoin.0.weight": "a typo"})


def test_the_optimizer_holds_exactly_the_trained_parameters_in_one_group():
    model, optimizer = make()
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.9, 0.95), 1e-8, 0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(3))
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == set(FROZEN)


def test_the_optimizer_continues_bit_for_bit_after_out_and_in(tmp_path):
    from safetensors.torch import load_file, save_file

    straight, optimizer = make()
    train(straight, optimizer, range(6))

    first, optimizer = make()
    train(first, optimizer, range(3))
    tensors = optimizer_tensors(optimizer, first)
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert set(tensors) == {f"{kind}/{name}" for name in trained for kind in ("step", "exp_avg", "exp_avg_sq")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "optimizer.safetensors")

    second, fresh = make()
    second.load_state_dict(first.state_dict())
    restore_optimizer(fresh, second, load_file(tmp_path / "optimizer.safetensors"))
    train(second, fresh, range(3, 6))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    # Without the state it would have gone elsewhere: the comparison above means something.
    third, fresh = make()
    third.load_state_dict(first.state_dict())
    train(third, fresh, range(3, 6))
    assert not torch.equal(third.expert.weight, straight.expert.weight)


def test_the_state_of_a_checkpoint_that_was_passed_over_is_gone(tmp_path, monkeypatch):
    model, optimizer = make()
    train(model, optimizer, range(2))
    # Of the older one every update was skipped.
    for name, tensors in (("damaged", optimizer_tensors(optimizer, model)), ("skipped", {})):
        (tmp_path / name / TRAINING).mkdir(parents=True)
        tensor_file.write(tmp_path / name / TRAINING / "optimizer.safetensors", tensors)
        (tmp_path / name / TRAINING / "state.json").write_text('{"step": 2}')
    model, fresh = make()
    saving.restore(tmp_path / "damaged", fresh, model)
    held = weakref.ref(fresh.state[model.expert.weight]["exp_avg"])
    gone: list[bool] = []

    def noticed(*arguments):
        gone.append(held() is None)
        return allocate_state(*arguments)

    monkeypatch.setattr(saving, "allocate_state", noticed)
    saving.restore(tmp_path / "damaged", fresh, model)
    assert gone == [True] and fresh.state  # before there was memory for another
    saving.restore(tmp_path / "skipped", fresh, model)
    assert not fresh.state


def saved_state() -> dict[str, torch.Tensor]:
    model, optimizer = make()
    train(model, optimizer, range(2))
    return optimizer_tensors(optimizer, model)


def test_the_state_of_other_parameters_is_refused():
    tensors = saved_state()
    model, optimizer = make({})  # trains more than the checkpoint's run did
    with pytest.raises(ValueError, match=r"missing \['head.weight', 'vision.0.bias', 'vision.0.weight'\].*frozen"):
        restore_optimizer(optimizer, model, tensors)
    model, optimizer = make(FROZEN | {"expert.bias": "now frozen"})
    with pytest.raises(ValueError, match=r"extra \['expert.bias'\].*must not change on a resume"):
        restore_optimizer(optimizer, model, tensors)
    model, optimizer = make()
    with pytest.raises(ValueError, match=r"expert.weight has shape \(3, 6\), the model has \(3, 5\)"):
        restore_optimizer(optimizer, model, tensors | {"exp_avg/expert.weight": torch.zeros(3, 6)})
    assert not optimizer.state or all(p.requires_grad for p in optimizer.state)


@pytest.mark.parametrize("kind", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_with_a_hole_is_refused(kind):
    tensors = saved_state()
    del tensors[f"{kind}/expert.weight"]
    model, optimizer = make()
    with pytest.raises(ValueError, match=rf"missing \['{kind}/expert.weight'\]"):
        restore_optimizer(optimizer, model, tensors)
