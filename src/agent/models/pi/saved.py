"""Says how π0 is stored: in LeRobot's layout, in the formats for export, and how exports are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.models import lerobot_folder
from agent.models.pi import adapter
from agent.models.pi.configuration import PI0Config
from agent.models.pi.formats import contents
from agent.models.pi.prompt import prompt, with_newline
from agent.models.pi.statistics import read_statistics

if TYPE_CHECKING:
    from torch import Tensor

    from agent.models.family import Statistics


def usage(target: str, location: str, model: Mapping[str, Any]) -> str:
    """Returns how an export is loaded, see ``agent.models.family.SavedForm.usage``."""
    if target == "openpi":
        return (
            "`model.safetensors` and `assets/` are what openpi's PyTorch policies load. With a training config of openpi "
            f"whose model is `Pi0Config(action_dim={model['max_action_dim']}, "
            f"action_horizon={model['chunk_size']})` and whose `asset_id` is the folder's name in `assets/`:\n\n"
            "```python\n"
            "from openpi.policies import policy_config\n\n"
            f'policy = policy_config.create_trained_policy(train_config, "{location}")\n'
            "```"
        )
    if target == "lerobot_v1":
        return (
            "With LeRobot before 0.4 (the statistics of the normalisation are in `model.safetensors`):\n\n"
            "```python\n"
            "from lerobot.common.policies.pi0.modeling_pi0 import PI0Policy  # in 0.2 and 0.3: lerobot.policies.pi0…\n\n"
            f'policy = PI0Policy.from_pretrained("{location}")\n'
            "```"
        )
    return (
        "With LeRobot 0.6.1, `uv add 'lerobot[pi]==0.6.1'`:\n\n"
        "```python\n"
        "from lerobot.policies.factory import make_pre_post_processors\n"
        "from lerobot.policies.pi0.modeling_pi0 import PI0Policy\n\n"
        f'policy = PI0Policy.from_pretrained("{location}")\n'
        "preprocess, postprocess = make_pre_post_processors(\n"
        f'    policy.config, pretrained_path="{location}",\n'
        '    preprocessor_overrides={"device_processor": {"device": policy.config.device}},\n'
        ")\n"
        "actions = postprocess(policy.predict_action_chunk(preprocess(observation)))\n"
        "```\n\n"
        "`observation` holds each camera as float (3, height, width) in [0, 1], the state, and the instruction as `task`."
    )


class PI0Saved:
    """Implements ``agent.models.family.SavedForm``, which documents the methods."""

    formats: Mapping[str, str] = {
        "lerobot": "LeRobot 0.6",
        "lerobot_v1": "LeRobot before 0.4 (v1)",
        "openpi": "openpi (PyTorch)",
    }
    prompt_steps: Mapping[str, Callable[[str], str]] = {"pi0_new_line_processor": with_newline}
    paper = "https://arxiv.org/abs/2410.24164"

    def pretrained_contents(
        self,
        config: PI0Config,
        tensors: dict[str, Tensor],
        statistics: Statistics,
        last_update: int,
        robots: dict[str, Any] | None = None,
        names: dict[str, list[str]] | None = None,
    ) -> tuple[dict[str, dict[str, Tensor]], Callable[[Path], None]]:
        published = adapter.to_lerobot(tensors, config)
        instructions = lerobot_folder.Instructions(prompt(config), tuple(self.prompt_steps))
        return lerobot_folder.pretrained_contents(
            config, published, instructions, statistics, last_update, robots, names
        )

    read_statistics = staticmethod(read_statistics)
    export = staticmethod(contents)
    usage = staticmethod(usage)
