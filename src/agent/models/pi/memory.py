"""Predicts the GPU memory of training π0 from its config, by listing the units that ``models.common.memory`` adds up."""

from __future__ import annotations

from collections.abc import Iterator

from agent.models.common import memory
from agent.models.common.memory import Memory, Training, Unit, gemma_unit, product_of, vision_units
from agent.models.pi.configuration import PI0Config


def predict(config: PI0Config, training: Training) -> Memory:
    """Predicts the memory of one process that trains this model on one GPU.

    Raises:
        ValueError: for an unknown value of ``training``.
    """
    return memory.predict(_units(config, training), training)


def _units(config: PI0Config, training: Training) -> Iterator[Unit]:
    patches = training.cameras * config.patches_per_camera
    language_tokens = config.tokenizer_max_length if training.language_tokens is None else training.language_tokens
    prefix = training.batch * (patches + language_tokens)
    suffix = training.batch * (1 + training.draws * config.chunk_size)
    product = 2 if training.use_bf16 or training.precision == "bfloat16_stochastic" else 4
    mode = training.activation_checkpointing
    train_prefix = not config.train_expert_only
    train_vision = train_prefix and not config.freeze_vision_encoder and training.cameras > 0
    per_camera = config.patches_per_camera
    yield from vision_units(config.vision, per_camera, training.batch * patches, product, mode, train_vision)
    yield _joint(config, training.batch * patches, product, train_prefix)
    language, expert = config.language, config.expert
    for layer in range(language.depth):
        last = layer == language.depth - 1
        yield gemma_unit(language, prefix, 0, product, mode, train_prefix, keys_values_only=last)
    yield Unit(((language.width,),), frozen=language.width)  # the final norm
    for _ in range(expert.depth):
        yield gemma_unit(expert, suffix, prefix, product, mode, trained=True)
    small = (
        (expert.width, config.max_state_dim), (expert.width,), (expert.width, config.max_action_dim), (expert.width,),
        (expert.width, 2 * expert.width), (expert.width,), (expert.width, expert.width), (expert.width,),
        (config.max_action_dim, expert.width), (config.max_action_dim,), (expert.width,),
    )  # fmt: skip
    # Approximately the inputs of the time MLP and of its second layer, of the final norm and of the output.
    kept = suffix * expert.width * (2 * product + 3 * product + 4 + 4)
    yield Unit(small, products=sum(map(product_of, small)), kept=kept, hand=kept)


def _joint(config: PI0Config, patch_tokens: int, product: int, trained: bool) -> Unit:
    """Returns the unit of the vision tower's last norm, the projector and the token embedding."""
    w, language = config.vision.width, config.language
    norm = ((w,), (w,))
    projector = ((language.width, w), (language.width,))
    embedding = (language.vocab_size, language.width)
    projects = trained and patch_tokens > 0
    norm_trains = projects and not config.freeze_vision_encoder
    frozen = (0 if norm_trains else 2 * w) + (0 if projects else language.width * (w + 1))
    frozen += product_of(embedding) if config.freeze_lm_head or not trained else 0
    # Trained shapes come first and frozen ones last, as the count of the optimizer's state expects.
    ordered = [(norm_trains, norm), (projects, projector), (trained and not config.freeze_lm_head, (embedding,))]
    shapes = tuple(shape for _, group in sorted(ordered, key=lambda entry: not entry[0]) for shape in group)
    kept = patch_tokens * ((4 * w + 8) * norm_trains + product * w) if projects else 0
    return Unit(shapes, frozen, language.width * (w + 1) if projects else 0, kept, 0, patch_tokens * language.width * 4)
