"""Names of π0's tensors here and elsewhere: LeRobot (0.6 and older), openpi's PyTorch port, Hugging Face PaliGemma.

The model knows only its own names. A ``Layout`` says how a foreign checkpoint names the same tensors, what it may
hold that we leave behind, and what it does not hold; reading files and accounting for every key is done elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from agent.models.common.names import Layout, Match
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0
from agent.models.pi.statistics import read_statistics

__all__ = ["fit", "from_lerobot", "from_paligemma", "read_statistics", "to_lerobot"]

if TYPE_CHECKING:
    from torch import Tensor

# PaliGemma's parts: our beginning of a name, the same in transformers from 4.52 on, and before.
PALIGEMMA_PARTS = [
    ("vision.patch_embedding.", "model.vision_tower.vision_model.embeddings.patch_embedding."),
    ("vision.position_embedding.", "model.vision_tower.vision_model.embeddings.position_embedding."),
    ("vision.layers.", "model.vision_tower.vision_model.encoder.layers."),
    ("vision.post_layernorm.", "model.vision_tower.vision_model.post_layernorm."),
    ("projector.", "model.multi_modal_projector.linear."),
    ("language.embedding.", "model.language_model.embed_tokens."),
    ("language.layers.", "model.language_model.layers."),
    ("language.norm.", "model.language_model.norm."),
]
OLD_PALIGEMMA_PARTS = [
    (ours, theirs.replace("model.language_model.", "language_model.model.").removeprefix("model."))
    for ours, theirs in PALIGEMMA_PARTS
]
EXPERT_PARTS = [("expert.layers.", "gemma_expert.model.layers."), ("expert.norm.", "gemma_expert.model.norm.")]
SMALL_PARTS = [
    (f"{name}.", f"{name}.")
    for name in ("state_proj", "action_in_proj", "action_time_mlp_in", "action_time_mlp_out", "action_out_proj")
]

EMBEDDING = "language.embedding.weight"
# What a checkpoint may hold and this model leaves behind, and why.
WAIVED = [
    (r"(.*\.)?gemma_expert\.lm_head\.weight", "the expert's language head is never used"),
    (r"(.*\.)?lm_head\.weight", "the language head is tied to the token embedding"),
    (
        r"(normalize_inputs|normalize_targets|unnormalize_outputs)\..*",
        "statistics of the data it was made with; used with `data.statistics: checkpoint` only",
    ),
]
# What PaliGemma does not bring, and why.
FRESH = [
    (
        r"(expert|state_proj|action_in_proj|action_time_mlp_in|action_time_mlp_out|action_out_proj)\..*",
        "PaliGemma has no action expert",
    )
]


def _policy(title: str, prefix: str, paligemma: list[tuple[str, str]]) -> Layout:
    inner = [(ours, f"paligemma_with_expert.paligemma.{theirs}") for ours, theirs in paligemma]
    inner += [(ours, f"paligemma_with_expert.{theirs}") for ours, theirs in EXPERT_PARTS]
    return Layout(title, [(ours, prefix + theirs) for ours, theirs in inner + SMALL_PARTS])


LEROBOT = _policy("LeRobot 0.4 to 0.6, and this project's own", "model.", PALIGEMMA_PARTS)
POLICIES = [
    LEROBOT,
    _policy("openpi's PyTorch export", "", PALIGEMMA_PARTS),
    _policy("LeRobot v1, of 2025", "model.", OLD_PALIGEMMA_PARTS),
]
PALIGEMMAS = [
    Layout("PaliGemma", PALIGEMMA_PARTS, FRESH),
    Layout("PaliGemma before transformers 4.52", OLD_PALIGEMMA_PARTS, FRESH),
]


def match(names: Iterable[str], layouts: list[Layout], config: PI0Config) -> Match:
    """Sorts the tensor names of a checkpoint, by the layout that explains most of them."""
    names, known = list(names), shapes(config)
    layout = max(layouts, key=lambda layout: sum(layout.ours(name) in known for name in names))
    sources: dict[str, str] = {}
    waived: dict[str, str] = {}
    extra: list[str] = []
    for name in names:
        ours = layout.ours(name)
        reason = next((reason for pattern, reason in WAIVED if re.fullmatch(pattern, name)), None)
        if ours is not None and ours in known:
            sources[ours] = name
        elif reason is not None:
            waived[name] = reason
        else:
            extra.append(name)
    # safetensors stores tied tensors once, and openpi's files keep the head. Where a file has both, the embedding
    # counts: LeRobot unties them and trains the embedding alone.
    head = next((name for name in waived if name.endswith("lm_head.weight") and "gemma_expert" not in name), None)
    if EMBEDDING not in sources and head is not None:
        sources[EMBEDDING] = head
        del waived[head]
    return Match(layout, sources, waived, extra)


def from_lerobot(names: Iterable[str], config: PI0Config) -> Match:
    """Sorts the tensor names of a π0 policy: LeRobot's, old or new, or openpi's."""
    return match(names, POLICIES, config)


def from_paligemma(names: Iterable[str], config: PI0Config) -> Match:
    """Sorts the tensor names of a Hugging Face PaliGemma; the expert is left fresh."""
    return match(names, PALIGEMMAS, config)


# The projections between the robot's padded vectors and the model: name → the config key of the padded size, and the
# dimension of the tensor that has it.
_PADDED = {
    "state_proj.weight": ("max_state_dim", 1),
    "action_in_proj.weight": ("max_action_dim", 1),
    "action_out_proj.weight": ("max_action_dim", 0),
    "action_out_proj.bias": ("max_action_dim", 0),
}


def fit(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> tuple[bool, str] | None:
    """What is to be said of our tensor ``name`` if it has shape ``theirs`` in a file and ``ours`` in the model.

    Returns:
        Whether to load the part that both have in common, and by which rule or what to write instead; None for a shape
        that is simply wrong.
    """
    if name == EMBEDDING and theirs[1:] == ours[1:] and theirs[0] > ours[0]:
        # The image placeholder and padding, which π0 has no use for.
        return (True, "rows that Hugging Face appended to the vocabulary are left behind")
    if name in _PADDED:
        key, dim = _PADDED[name]
        if theirs[:dim] + theirs[dim + 1 :] != ours[:dim] + ours[dim + 1 :]:
            return None
        if theirs[dim] > ours[dim]:
            return (False, f"write {key}: {theirs[dim]}, the dimensions that a robot lacks are padded with zeros")
        # Zero columns do not see what is in the new dimensions and zero rows predict no motion there: the same function.
        return (True, f"{key} is {theirs[dim]} in the file: the weights of the added dimensions are zero")
    return None


def shapes(config: PI0Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, without building it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in PI0(config).state_dict().items()}


def expected(config: PI0Config) -> dict[str, str]:
    """Our name of every tensor of the model → LeRobot 0.6's."""
    return {name: _lerobot_name(name) for name in shapes(config)}


def _lerobot_name(name: str) -> str:
    theirs = LEROBOT.theirs(name)
    assert theirs is not None, f"{name} has no name in LeRobot"
    return theirs


def to_lerobot(state_dict: dict[str, Tensor], config: PI0Config) -> dict[str, Tensor]:
    """Our tensors under LeRobot 0.6's names, with the two language heads that its strict loading demands.

    The tensors are the model's own. The language head shares the embedding's memory and the expert's head is one zero
    expanded, so neither costs any; ``agent.checkpoints.tensor_file`` writes both, the safetensors library wants copies.
    """
    out = {_lerobot_name(name): tensor for name, tensor in state_dict.items()}
    prefix = "model.paligemma_with_expert."
    out[f"{prefix}paligemma.lm_head.weight"] = state_dict[EMBEDDING]
    # Nothing reads the expert's head: a small type saves half a gigabyte.
    zero = torch.zeros((), dtype=torch.bfloat16, device="cpu")
    out[f"{prefix}gemma_expert.lm_head.weight"] = zero.expand(config.expert.vocab_size, config.expert.width)
    return out
