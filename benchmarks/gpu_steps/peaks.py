"""Memory of updates at full size beside what `agent.models.pi.memory` predicts, and a full fine-tune within 24 GB."""

from __future__ import annotations

import torch
from contenders import model_config
from memory import measure

from agent.models.common.memory import Training
from agent.models.pi.memory import predict
from gpu_steps.place import Place

CARD = 23.5 * (1 << 30)  # of 24 GB, beside the CUDA context
ROWS = (  # batch, cameras, recomputed, optimizer, precision; the first is the one for a card of 24 GB
    (4, 2, "full", "adamw8bit", "bfloat16_stochastic"),
    (4, 2, "none", "adamw8bit", "bfloat16_stochastic"),
    (4, 2, "full", "adamw", "float32_master"),
    (32, 3, "full", "adamw8bit", "bfloat16_stochastic"),
    (32, 3, "blocks", "adamw", "float32_master"),
    (32, 2, "none", "adamw", "float32_master"),
)


def run(place: Place) -> None:
    """Passes if every peak is within a tenth of the prediction."""
    size = place.size("full")
    for batch, cameras, recomputed, optimizer, precision in ROWS:
        training = Training(
            min(batch, 2) if place.rehearsal else batch, cameras, None, 1, recomputed, optimizer, precision
        )
        config = model_config(size, cameras)
        config.freeze_lm_head = True
        predicted = predict(config, training).peak
        small = (batch, optimizer, recomputed) == (4, "adamw8bit", "full") and place.gpu
        cap = CARD / torch.cuda.get_device_properties(0).total_memory if small else None
        measured = measure(size, training, freeze_lm_head=True, cap=cap)
        passed = (measured is not None and abs(measured / predicted - 1) < 0.1) if place.gpu else None
        row = {
            "batch": batch,
            "cameras": cameras,
            "recomputed": recomputed,
            "optimizer": optimizer,
            "precision": precision,
        }
        place.tell(" ".join(map(str, row.values())), passed, **row, within_24_gb=small, predicted_bytes=predicted,
                   measured_bytes=measured)  # fmt: skip
