"""Counts the floating-point operations of a training step of π0 from the sizes in its config alone.

A multiplication and an addition are two FLOP. A matrix product with a trained parameter costs 2 FLOP per element of the
matrix and token in the forward pass and 4 in the backward pass, half of them for the gradient of its input. Norms,
activation functions and rotations are not counted: they are less than a hundredth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.models.common.sizes import GemmaVariant
    from agent.models.pi.configuration import PI0Config


def flop_per_sample(
    config: PI0Config, cameras_present: int, language_tokens: int | None = None, draws: int = 1
) -> float:
    """Returns the FLOP of forward and backward pass for one sample; recomputed activations are not counted.

    Args:
        config: the model's config.
        cameras_present: number of cameras that the sample has; absent ones are not computed.
        language_tokens: tokens of the sample's instruction; None for ``tokenizer_max_length``.
        draws: flow-matching draws per observation.
    """
    return sum(flop_by_part(config, cameras_present, language_tokens, draws).values())


def flop_by_part(
    config: PI0Config, cameras_present: int, language_tokens: int | None = None, draws: int = 1
) -> dict[str, float]:
    """Splits ``flop_per_sample`` into ``vision``, ``language``, ``expert`` and the attention of each."""
    patches = cameras_present * config.patches_per_camera
    language_tokens = config.tokenizer_max_length if language_tokens is None else language_tokens
    prefix, suffix = patches + language_tokens, 1 + draws * config.chunk_size
    vision, language, expert = config.vision, config.language, config.expert
    # Passes per matrix product: forward, gradient of the weights, gradient of the input.
    prefix_passes = 1 if config.train_expert_only else 3
    vision_passes = 1 if config.train_expert_only or config.freeze_vision_encoder else 3
    projector_passes = 1 if config.train_expert_only else 2 if config.freeze_vision_encoder else 3

    per_patch = 3 * vision.patch_size**2 * vision.width
    vision_layer = 4 * vision.width**2 + 2 * vision.width * vision.mlp_dim
    vision_flop = 2.0 * patches * vision.depth * vision_layer * vision_passes
    vision_flop += 2.0 * patches * per_patch * min(vision_passes, 2)  # an image needs no gradient
    vision_flop += 2.0 * patches * vision.width * language.width * projector_passes
    seen = config.patches_per_camera
    vision_attention = 4.0 * patches * seen * vision.width * vision.depth * vision_passes

    # The last prefix layer computes only keys and values.
    language_numbers = language.depth * _keys_values(language) + (language.depth - 1) * _rest(language)
    language_flop = 2.0 * prefix * language_numbers * prefix_passes
    heads = language.heads * language.head_dim
    language_attention = 4.0 * prefix * prefix * heads * (language.depth - 1) * prefix_passes

    actions = suffix - 1
    expert_flop = 6.0 * suffix * expert.depth * (_keys_values(expert) + _rest(expert))
    expert_flop += 6.0 * actions * (2 * config.max_action_dim * expert.width + 3 * expert.width**2)
    expert_flop += 6.0 * config.max_state_dim * expert.width
    # The state attends to the prefix and itself; an action also attends to the state and to the actions of its own draw.
    seen_by_all = prefix + 1 + actions * (prefix + 1 + config.chunk_size)
    expert_attention = 4.0 * seen_by_all * expert.heads * expert.head_dim * expert.depth * 3
    return {
        "vision": vision_flop,
        "vision attention": vision_attention,
        "language": language_flop,
        "language attention": language_attention,
        "expert": expert_flop,
        "expert attention": expert_attention,
    }


def _keys_values(table: GemmaVariant) -> int:
    """Returns the elements of a layer's key and value projections."""
    return 2 * table.width * table.kv_heads * table.head_dim


def _rest(table: GemmaVariant) -> int:
    """Returns the elements of a layer's other matrices."""
    return 2 * table.width * table.heads * table.head_dim + 3 * table.width * table.mlp_dim
