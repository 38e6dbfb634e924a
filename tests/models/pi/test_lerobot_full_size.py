"""A checkpoint of published sizes opens in LeRobot 0.6.1 as it is, acts the same there, and is exported piece by piece.

1.3 billion float32 parameters: SigLIP so400m, and gemma_300m as the action expert and as the language model too, since
gemma_2b would need more memory than a laptop has. LeRobot knows that size by name but fixes the width of the image
projector to gemma_2b's; that one number is put right here.

Run: pytest tests/models/pi/test_lerobot_full_size.py -m slow -s
(two and a half minutes on two cores; 8 GB of memory, 15 GB with the pages of the mapped file, and 10 GB of disk)
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import torch
from support.lerobot import CAMERAS, Recording, make_config, make_statistics, our_actions, their_actions
from support.stores import write_pretrained

from agent.data.normalization.normalizer import to_lerobot_stats
from agent.models.lerobot_config import FeatureSpec
from agent.models.pi.model import PI0

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    """In the repository, where the tokenizer is; LeRobot's projector as wide as the language model."""
    import lerobot.policies.pi0.modeling_pi0 as modeling

    class Vlm(modeling.PaliGemmaForConditionalGenerationWithPiGemma):
        def __init__(self, config):
            config.vision_config.projection_dim = config.text_config.hidden_size
            super().__init__(config)

    monkeypatch.setattr(modeling, "PaliGemmaForConditionalGenerationWithPiGemma", Vlm)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def large_files(tmp_path) -> Iterator[Path]:
    """A folder that does not stay for the next three sessions, as pytest's own would."""
    with TemporaryDirectory(dir=tmp_path) as folder:
        yield Path(folder)


def filled(config) -> PI0:
    """A model of random weights with activations of natural size; the model's own initialisation takes longer."""
    with torch.device("meta"):
        model = PI0(config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[1:].numel()
            parameter.normal_(std=fan_in**-0.5 if parameter.ndim > 1 else 0.1, generator=generator)
            if name.startswith("vision.") and "norm" in name and name.endswith("weight"):
                parameter += 1
    return model.eval()


def report(what: str, since: float) -> float:
    now = time.monotonic()
    print(f"{what}: {now - since:.0f} s, {psutil.Process().memory_info().rss / 1e9:.1f} GB resident")
    return now


def peak_of(command: list[str]) -> float:
    """Runs a process; the most anonymous memory that it held, in bytes. Mapped files do not count."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        peak = max(peak, int(lines.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.01)
    assert process.returncode == 0, process.communicate()[0]
    return peak


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_size_checkpoint_opens_in_lerobot_and_is_exported_in_pieces(large_files, capfd):
    size = 224
    config = make_config(
        paligemma_variant="gemma_300m",
        image_resolution=(size, size),
        input_features={name: FeatureSpec("VISUAL", [3, size, size]) for name in CAMERAS}
        | {"observation.state": FeatureSpec("STATE", [5])},
    )
    begin = clock = time.monotonic()
    model = filled(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1.2e9
    recording = Recording((size, size), size=1)
    ours = our_actions(model, recording, resized_by_the_model=False)
    clock = report("\nour model and its actions", clock)
    folder = large_files / "pretrained_model"
    folder.mkdir()
    write_pretrained(folder, config, model.state_dict(), to_lerobot_stats(*make_statistics()), last_update=200)
    del model
    gc.collect()
    clock = report("written", clock)

    theirs = their_actions(folder, recording)
    said = capfd.readouterr()
    assert "All keys loaded successfully!" in said.out and "Could not load" not in said.out + said.err
    scale = theirs.std(dim=(0, 1)).clamp_min(1e-3)  # of each dimension in its own unit
    deviation = float(((ours - theirs).abs() / scale).max())
    print(said.out)
    clock = report(f"LeRobot's actions, which differ by {deviation:.1e} of an action's spread", clock)
    assert float(theirs.std(dim=1).max()) > 1e-2 and deviation < 1e-4
    gc.collect()

    command = [sys.executable, "-m", "agent.export", "--checkpoint", str(folder), "--to", "openpi"]
    peak = peak_of([*command, "--out", str(large_files / "out"), "--save_dtype", "bfloat16"])
    written = (large_files / "out" / "model.safetensors").stat().st_size
    report(f"{written / 1e9:.1f} GB exported with {peak / 1e9:.2f} GB of memory", clock)
    print(f"altogether: {time.monotonic() - begin:.0f} s")
    assert written > 2e9 and peak < 1e9
