"""Knows the policies that other programs have and this one does not, to answer a config with such a ``type``.

Without such a list `pi0fast` would be taken for a misspelled `pi0`, which is another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from agent.models.base import ModelConfig
from agent.models.lerobot_config import TrainableConfig
from agent.spelling import nearest

# Maps the name of a type, reduced to letters and digits → what it is. It lists the policies and reward models of LeRobot
# 0.6.1, names that LeRobot had before, and the models of INT-ACT and openpi.
_OTHERS = {
    "act": "ACT",
    "diffusion": "Diffusion Policy",
    "eo1": "EO-1",
    "evo1": "Evo-1",
    "fastwam": "FastWAM",
    "gaussianactor": "the actor of LeRobot's reinforcement learning",
    "groot": "GR00T",
    "lingbotva": "LingBot-VA",
    "molmoact2": "MolmoAct 2",
    "multitaskdit": "the multi-task diffusion transformer",
    "openvla": "OpenVLA",
    "openvlaoft": "OpenVLA-OFT",
    "pi05": "π0.5",
    "pi0fast": "π0-FAST, which predicts tokens of actions one after the other",
    "rewardclassifier": "LeRobot's reward classifier, no policy",
    "robometer": "Robometer, a reward model and no policy",
    "sac": "SAC",
    "sarm": "SARM, a reward model and no policy",
    "smolvla": "SmolVLA",
    "tdmpc": "TD-MPC",
    "topreward": "TOPReward, a reward model and no policy",
    "vlajepa": "VLA-JEPA",
    "vqbet": "VQ-BeT",
    "wallx": "WALL-X",
    "xvla": "X-VLA",
}


def unknown_type(name: str, choices: Iterable[str]) -> str:
    """Says what a ``type`` is that is none of the choices; the text continues after the name.

    Args:
        name: as the config has it.
        choices: the types that are known here.
    """
    here = {_plain(choice): choice for choice in choices}
    plain = _plain(name)
    if plain not in here and plain in _OTHERS:
        return f"is {_OTHERS[plain]}: another model, which cannot be trained here; {_trainable()} can"
    near = nearest(plain, [*here, *(other for other in _OTHERS if other not in here)])
    if near is None:
        return f"is not known; write one of {', '.join(here.values())}"
    if near in here:
        return f"is not known; did you mean '{here[near]}'?"
    return (
        f"is not known; the nearest name is that of {_OTHERS[near]}: another model, which cannot be trained here; "
        f"{_trainable()} can"
    )


def title(name: str) -> str:
    """Gives what a ``type`` of another model stands for, in brackets; empty for one that is not known either."""
    return f" ({_OTHERS[_plain(name)]})" if _plain(name) in _OTHERS else ""


def _trainable() -> str:
    choices = ModelConfig.get_known_choices().items()
    return " and ".join(name for name, config in choices if issubclass(config, TrainableConfig))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
