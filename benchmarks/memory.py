"""Peak memory of a training step by batch, cameras, activation checkpointing, optimizer and precision.

    uv run python benchmarks/memory.py --size full --cameras 2 --batch 4 --freeze_lm_head

On a GPU each row is measured (the most that torch has allocated over three updates of `agent.training.step.train_step`) and
set beside the prediction of `agent.models.pi.memory`; without one the table is the prediction alone, in seconds, and
says so. `card` adds an allowance for what torch does not count. Activations are those kept at the end of the forward
pass. GiB; the last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from typing import Any

from agent.models.common.memory import Training
from agent.models.pi.memory import predict

GIB = 1 << 30


def main() -> None:
    """Reads the options, predicts and, on a GPU, measures."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["reduced", "full"], default="full")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--cameras", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--activation_checkpointing", nargs="+", default=["none", "blocks", "full"])
    parser.add_argument("--optimizer", nargs="+", default=["adamw", "adamw8bit"])
    parser.add_argument("--precision", nargs="+", default=["float32_master", "bfloat16_stochastic"])
    parser.add_argument("--freeze_lm_head", action="store_true", help="do not train the token embeddings")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    print(f"{options.size}, bfloat16 products, token embeddings {'frozen' if options.freeze_lm_head else 'trained'}; "
          + (f"measured on {torch.cuda.get_device_name()} and predicted" if gpu else "predicted, not measured"))  # fmt: skip
    print(f"{'batch':>5}{'cameras':>8}  {'recomputed':<11}{'optimizer':<11}{'precision':<21}{'weights':>8}{'gradients':>10}"
          f"{'state':>7}{'activations':>12}{'peak':>7}{'card':>7}{'measured':>10}")  # fmt: skip
    rows = [
        row(options, Training(batch, cameras, None, 1, recomputed, optimizer, precision), gpu)
        for batch, cameras, recomputed, optimizer, precision in itertools.product(
            options.batch, options.cameras, options.activation_checkpointing, options.optimizer, options.precision
        )
    ]
    print(json.dumps({"measured": gpu, "rows": rows}))


def row(options: argparse.Namespace, training: Training, gpu: bool) -> dict[str, Any]:
    """A line of the table, printed; its numbers."""
    from contenders import model_config

    config = model_config(options.size, training.cameras)
    config.freeze_lm_head = options.freeze_lm_head
    memory = predict(config, training)
    measured = measure(options.size, training, options.freeze_lm_head) if gpu else None
    numbers = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.peak, memory.card)
    text = "".join(f"{n / GIB:{width}.2f}" for n, width in zip(numbers, (8, 10, 7, 12, 7, 7), strict=True))
    said = f"{measured / GIB:10.2f}" if measured else f"{'no memory' if gpu else '-':>10}"
    print(f"{training.batch:>5}{training.cameras:>8}  {training.activation_checkpointing:<11}{training.optimizer:<11}"
          f"{training.precision:<21}{text}{said}", flush=True)  # fmt: skip
    return {
        "batch": training.batch,
        "cameras": training.cameras,
        "activation_checkpointing": training.activation_checkpointing,
        "optimizer": training.optimizer,
        "precision": training.precision,
        "predicted_bytes": memory.peak,
        "measured_bytes": measured,
    }


def measure(size: str, training: Training, freeze_lm_head: bool, cap: float | None = None) -> int | None:
    """Most bytes that torch has allocated over three updates; None if the GPU has not that much.

    Args:
        size: of the model.
        training: the settings.
        freeze_lm_head: do not train the token embeddings.
        cap: the fraction of the card's memory that the process may take.
    """
    import torch
    from contenders import Ours, make_batch, model_config, train_config

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    model = model_config(size, training.cameras)
    model.freeze_lm_head = freeze_lm_head
    config = train_config(
        model,
        training.batch,
        use_bf16=True,
        activation_checkpointing=training.activation_checkpointing,
        optimizer=training.optimizer,
        precision=training.precision,
    )
    batch = make_batch(model, training.cameras, training.batch, model.tokenizer_max_length)
    if gpu:
        torch.cuda.set_per_process_memory_fraction(cap or 1.0)
    ours = None
    try:
        ours = Ours(config, batch, device)
        ours.arm()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            ours.step()
        return torch.cuda.max_memory_allocated() if gpu else None
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        del ours
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
