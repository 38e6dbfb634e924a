"""Which attention kernels a run uses where some of them are wrong; a CPU stands in for the GPU, its kernels for a GPU's.

Run: uv run pytest tests/models/test_attention_kernels.py
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from support.small_model import lively_model
from torch import Tensor
from torch.nn.attention import SDPBackend

from agent.models.common import attention, attention_kernels
from agent.models.common.attention_kernels import choose_attention

FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Sets the process's choices back."""
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    attention.packed_kernel = True


def enabled() -> dict[str, bool]:
    return {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "packed": attention.packed_kernel,
    }


def break_kernel(monkeypatch: pytest.MonkeyPatch, broken: str, how: str) -> None:
    """``attend`` with one kernel broken: the one that takes masks, heads or packed sequences of some kind."""
    real = attention.attend

    def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: object) -> Tensor:
        packed = isinstance(seen, attention.Packing)
        kernels = {
            "packed": packed,
            "flash": enabled_alone("flash") and not packed,
            "efficient": enabled_alone("efficient") and not packed,
        }
        out = real(queries, keys, values, seen)  # type: ignore[arg-type]
        if not kernels[broken]:
            return out
        if how == "raises":
            raise RuntimeError("cuDNN Frontend error: no valid execution plans\nmore lines")
        if how == "lacks the shape":
            raise RuntimeError("No available kernel. Aborting execution.")
        if how == "wrong output":
            return out * 1.05
        return out * (1 + (queries - queries.detach()).sum())  # right output, wrong gradient

    monkeypatch.setattr(attention_kernels, "attend", attend)


def enabled_alone(name: str) -> bool:
    return {key for key, on in enabled().items() if on and key != "packed"} == {name}


@pytest.mark.parametrize("broken", ["flash", "efficient", "packed"])
@pytest.mark.parametrize("how", ["raises", "wrong output", "wrong gradient"])
def test_a_wrong_kernel_is_turned_off_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str, how: str
) -> None:
    break_kernel(monkeypatch, broken, how)
    choose_attention(lively_model(), CPU, torch.bfloat16)
    assert enabled() == {"flash": True, "efficient": True, "cudnn": False, "math": True, "packed": True} | {
        broken: False
    }
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert broken in warning and ("no valid execution plans;" in warning if how == "raises" else "off by" in warning)
    assert "heads=" in warning and "head_dim=" in warning


def test_right_kernels_stay(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for dtype in (torch.bfloat16, torch.float32):
        choose_attention(lively_model(), CPU, dtype)
        packed = dtype == torch.bfloat16  # flash attention takes 16 bits alone
        assert enabled() == {"flash": True, "efficient": True, "cudnn": False, "math": True, "packed": packed}
    assert "2 shapes tried" in caplog.text and "all kernels right" in caplog.text


def test_a_kernel_that_does_not_take_a_shape_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kernel(monkeypatch, "efficient", "lacks the shape")
    choose_attention(lively_model(), CPU, torch.bfloat16)
    assert enabled()["efficient"]
