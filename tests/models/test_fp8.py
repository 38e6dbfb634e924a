"""Products in 8 bits: how far off they are, what stays exact, and where they are refused.

Run: uv run pytest tests/models/test_fp8.py      (half a minute; one run is a real process)
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.forked import ForkServer
from support.launching import Workplace
from support.small_model import lively_model, make_batch, relative

from agent.configuration_pipeline import ConfigError, load_config
from agent.models.common.fp8 import Fp8Linear, use_fp8
from agent.models.common.modules import Linear
from agent.optim.optimizer import freeze

CPU = torch.device("cpu")
LAYER = 0.08  # relative, of a row of a product of two matrices whose numbers keep e4m3's three bits of mantissa
MODEL = 0.02  # of the loss


def linear(inner: int, outer: int) -> Linear:
    layer = Linear(inner, outer, bias=False)
    torch.nn.init.normal_(layer.weight, std=inner**-0.5, generator=torch.Generator().manual_seed(0))
    return layer


def test_a_layer_is_within_its_bound_and_the_weights_gradient_exact() -> None:
    plain = linear(256, 96)
    rounded = copy.deepcopy(plain)
    use_fp8([rounded], CPU)
    random = torch.Generator().manual_seed(1)
    # Rows of very different size: each has a scale of its own.
    scales = 10.0 ** torch.linspace(-4, 3, 40)[None, :, None]
    x = (torch.randn(2, 40, 256, generator=random) * scales).requires_grad_()
    weight = torch.randn(2, 40, 96, generator=random)
    found = []
    for layer in (plain, rounded):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        found.append((out, *torch.autograd.grad((out * weight).sum(), (x, layer.weight))))
    for ours, exact in zip(found[1][:2], found[0][:2], strict=True):
        assert ours.dtype == exact.dtype
        worst = ((ours - exact).float().norm(dim=-1) / exact.float().norm(dim=-1)).max()
        assert 1e-3 < worst < LAYER  # it is rounded, and not by more than it may be
    assert torch.equal(found[1][2], found[0][2])


def test_a_model_is_within_its_bound_and_only_its_language_mlps_change() -> None:
    exact, rounded = lively_model(), lively_model()
    for model in (exact, rounded):
        freeze(model, model.frozen_parameters())
    layers = rounded.fp8_layers()
    assert len(layers) == 2 * 3  # the last layer's MLP does not reach the loss
    use_fp8(layers, CPU)
    changed = {name for name, module in rounded.named_modules() if isinstance(module, Fp8Linear)}
    assert all(name.startswith("language.layers.") and ".mlp." in name for name in changed) and len(changed) == 6
    assert exact.state_dict().keys() == rounded.state_dict().keys()
    losses = []
    for model in (exact, rounded):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(make_batch())["flow"]
        loss.sum().backward()
        losses.append(loss.detach())
    assert 0 < relative(losses[1], losses[0]) < MODEL
    for (name, ours), theirs in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
    assert torch.equal(exact(make_batch())["flow"], rounded(make_batch())["flow"])  # in float32 nothing is rounded


def test_a_run_trains_and_a_resume_may_not_change_it(place: Workplace, server: ForkServer) -> None:
    short = ("--n_updates", "4", "--eval_freq", "0", "--save_model_freq", "2", "--use_bf16", "true")
    for name, more in (("plain", ()), ("fp8", ("--fp8", "mlp"))):
        output = server.start(place, name, *short, *more).wait()
        assert place.status(name)["state"] == "finished", output
    ours, theirs = (place.metrics(name)[-1]["loss"] for name in ("fp8", "plain"))
    assert ours != theirs and ours == pytest.approx(theirs, rel=MODEL)
    assert place.tensors("fp8").keys() == place.tensors("plain").keys()
    output = server.start(place, "fp8", *short, "--n_updates", "6").wait()
    assert "fp8: mlp → none" in output


def test_where_it_is_refused(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml: Path = place.folder / "tiny.yaml"
    with pytest.raises(ConfigError, match="write use_bf16: true, or fp8: none"):
        load_config(yaml, ["--fp8", "mlp", "--use_bf16", "false"], 1)
    with pytest.raises(ValueError, match="multiples of 16, and one is 24 → 40"):
        use_fp8([linear(24, 40)], CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(ValueError, match="this one is a NVIDIA A100; write fp8: none"):
        use_fp8([linear(32, 32)], torch.device("cuda"))
