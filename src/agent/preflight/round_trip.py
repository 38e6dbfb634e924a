"""A checkpoint written to the run folder's disk and read again: is it the same?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from agent.preflight.report import Row
from agent.spelling import amount, span

if TYPE_CHECKING:
    from torch import Tensor

    from agent.training.saving import Saver
    from agent.training.train_state import Run


def check(run: Run, saver: Saver) -> Row:
    """Saves as training does, forgets, loads as a restart does, and compares every bit."""
    import torch

    from agent.training import resuming

    before, step, begin = _fingerprints(run), run.state.step, time.perf_counter()
    saver.save()
    saver.finish(must_succeed=True)
    saved = time.perf_counter()
    with torch.no_grad():
        for tensor in [*run.policy.state_dict().values(), *_average(run).values()]:
            tensor.zero_()
    run.optimizer.state.clear()
    found = run.checkpoints.candidates()
    state = resuming.resume(
        run.config, run.data, run.checkpoints, found, run.processes, run.policy, run.optimizer, run.ema
    )
    after = _fingerprints(run)
    size = sum(path.stat().st_size for path in Path(found[0]).rglob("*") if path.is_file())
    text = f"{amount(size)}, saved in {span(saved - begin)}, loaded in {span(time.perf_counter() - saved)}"
    different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if different or state is None or state.step != step:
        text += f"; {len(different)} tensors came back otherwise, {', '.join(different[:3])}"
        return Row("save and load", "fail", text, "do not train on this disk; copy a large file to it and compare")
    return Row("save and load", "pass", f"{text}; {len(before)} tensors the same bit for bit", details={"bytes": size})


def _fingerprints(run: Run) -> dict[str, int]:
    from agent.training.replicas import fingerprints, fingerprints_of

    average = {f"ema/{name}": tensor for name, tensor in _average(run).items()}
    return fingerprints(run.policy, run.optimizer) | (fingerprints_of(average) if average else {})


def _average(run: Run) -> dict[str, Tensor]:
    return run.ema.tensors if run.ema is not None else {}
