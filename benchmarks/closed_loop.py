"""LeRobot's π0 beside ours in closed loop: the same demonstrations, the same samples in the same order, the same size.

    uv run --extra sim python benchmarks/closed_loop.py train --updates 10000 --out runs/pi0_metaworld_lerobot
    uv run --extra sim python benchmarks/closed_loop.py play --updates 10000 --seed 3000 --out runs/pi0_metaworld_lerobot

`train` trains LeRobot's `PI0Policy` as its own training loop does, on the samples that the config gives (one draw of
noise and time each, LeRobot's own); optimizer and learning rates are the config's, also where `--updates` ends it earlier.
Sizes are the model JSON's, but for the heads: LeRobot's attention assumes eight, so they are eight, narrower in
proportion. Stopped, it continues after the update that it saved last. Keys of the config may be changed as for run.py
(`--use_bf16 true`). `play` is agent.evaluate_sim's loop with LeRobot's
policy predicting the chunks.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot_contender import lerobot_of_size

from agent.configuration_pipeline import load_config
from agent.data.normalization.normalizer import Normalizer
from agent.data.samples.reader import collate
from agent.data.samples.task_tokens import make_task_tokens
from agent.models import registry
from agent.models.pi import adapter
from agent.models.pi.model import PI0
from agent.optim.learning_rate import LearningRate
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes
from agent.reproducibility import stream
from agent.settings.plan import make_plan
from agent.training.run_data import build_run_data

log = logging.getLogger("closed_loop")
HEADS = 8


def read(config_path: str, changes: list[str]) -> tuple[Any, Any]:
    """The config, with eight heads, and its data."""
    overrides = ["--flow_samples_per_observation", "1", "--use_wandb", "false", *changes]
    config, _ = load_config(config_path, overrides, 1)
    model: Any = config.model_cfg
    for key in ("paligemma_variant", "action_expert_variant"):
        table = getattr(model, "language" if key.startswith("pali") else "expert")
        width = table.heads * table.head_dim
        setattr(model, key, replace(table, heads=HEADS, head_dim=width // HEADS))
    data = build_run_data(config, Processes(Launch(), torch.device("cpu")))
    return config, data


def make_policy(model: Any, data: Any) -> Any:
    """LeRobot's policy of this size, with weights drawn as ours are."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config

    theirs = PI0Config(
        device="cpu",
        chunk_size=model.chunk_size,
        n_action_steps=model.action_steps,
        image_resolution=tuple(model.image_resolution),
        tokenizer_max_length=model.tokenizer_max_length,
        max_state_dim=model.max_state_dim,
        max_action_dim=model.max_action_dim,
        num_inference_steps=model.num_inference_steps,
        input_features={
            **{s: PolicyFeature(FeatureType.VISUAL, (3, *model.image_resolution)) for s in model.camera_slots},
            "observation.state": PolicyFeature(FeatureType.STATE, (data.spec.state_dim,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (data.spec.action_dim,))},
        push_to_hub=False,
    )
    with lerobot_of_size(model) as modeling:
        policy = modeling.PI0Policy(theirs)
    ours = PI0(model)
    ours.init_weights(torch.Generator().manual_seed(42))
    policy.load_state_dict(adapter.to_lerobot(ours.state_dict(), model), strict=True)
    return policy


def as_theirs(observation: Any, max_tokens: int, state_dim: int) -> dict[str, torch.Tensor]:
    """Our observation as LeRobot's preprocessor hands it over."""
    missing = max_tokens - observation.tokens.shape[1]
    return {slot: image.float() / 255 for slot, image in observation.images.items()} | {
        "observation.state": observation.state[:, :state_dim],
        "observation.language.tokens": torch.nn.functional.pad(observation.tokens, (0, missing)),
        "observation.language.attention_mask": torch.nn.functional.pad(observation.token_mask, (0, missing)),
    }


def train(options: argparse.Namespace) -> None:
    """Trains LeRobot's policy, from where it was stopped, and saves its weights."""
    config, data = read(options.config_path, options.changes)
    model: Any = config.model_cfg
    policy = make_policy(model, data).train()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    log.info("%.2f M parameters", sum(p.numel() for p in parameters) / 1e6)
    torch.manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=model.optimizer_lr,
        betas=tuple(model.optimizer_betas),
        eps=model.optimizer_eps,
        weight_decay=model.optimizer_weight_decay,
        fused=True,
    )
    plan = make_plan(config, 1, data.mixture.frames)
    rate = LearningRate.plan(
        model.optimizer_lr, model.scheduler_decay_lr, model.scheduler_warmup_steps, None, plan.n_updates
    )
    progress = Progress(Path(options.out), [options.config_path, *options.changes], policy, optimizer)
    size, losses = config.global_batch_size, []
    for update in range(progress.updates, options.updates):
        samples = [data.reader.sample(k, *data.mixture[k]) for k in range(update * size, (update + 1) * size)]
        batch = collate(samples, data.spec, data.reader.tokens.pad_token_id)
        theirs = as_theirs(batch.observation, model.tokenizer_max_length, data.spec.state_dim)
        theirs |= {"action": batch.actions.values[..., : data.spec.action_dim], "action_is_pad": batch.actions.is_pad}
        for group in optimizer.param_groups:
            group["lr"] = rate.at(update)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(config.use_bf16)):
            loss, _ = policy.forward(theirs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or model.optimizer_grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (update + 1) % 20 == 0:
            spent = progress.seconds() / (update + 1)
            log.info("update %d loss %.4f, %.2f s each", update + 1, np.mean(losses[-20:]), spent)
        if (update + 1) % options.save_every == 0 or update + 1 == options.updates:
            progress.save(update + 1)


class Progress:
    """What a training has come to, kept in a folder; a training that begins there continues from it.

    Raises:
        ValueError: if another config's training is in the folder.
    """

    def __init__(self, out: Path, config: list[str], policy: Any, optimizer: torch.optim.Optimizer) -> None:
        self._out, self._config, self._policy, self._optimizer = out, config, policy, optimizer
        self._begin, self.updates = time.monotonic(), 0
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "training.pt").is_file():
            return
        kept = torch.load(out / "training.pt", weights_only=True)
        if kept["config"] != config:
            raise ValueError(f"--out: {out} is of {' '.join(kept['config'])}; name another folder")
        policy.load_state_dict(kept["policy"])
        optimizer.load_state_dict(kept["optimizer"])
        torch.set_rng_state(kept["random"])
        self.updates, self._begin = kept["updates"], self._begin - kept["seconds"]
        log.info("continuing after update %d", self.updates)

    def seconds(self) -> float:
        """Of training so far, all starts together."""
        return time.monotonic() - self._begin

    def save(self, updates: int) -> None:
        """The weights after so many updates, what `play` needs to know of them, and what a continuation needs."""
        weights = self._policy.state_dict()
        torch.save(weights, self._out / f"policy_{updates}.pt")
        facts = {"config": self._config, "updates": updates, "minutes": self.seconds() / 60}
        (self._out / f"facts_{updates}.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
        kept = {
            "config": self._config,
            "updates": updates,
            "seconds": self.seconds(),
            "policy": weights,
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(kept, self._out / "training.pt.new")
        (self._out / "training.pt.new").replace(self._out / "training.pt")


class LeRobotActor:
    """LeRobot's policy for agent.simulation's loop; noise is keyed as ours."""

    def __init__(self, policy: Any, model: Any, data: Any, seed: int) -> None:
        self._policy, self._model, self._data, self._seed = policy.eval(), model, data, seed
        self._tokens = make_task_tokens(registry.family(model).prompt(model), _sentences())
        robot = data.robots[0]
        self._state: Normalizer = robot.state
        self._decode = robot.decode
        self.begin("", 0)

    def begin(self, task: str, episode: int) -> None:
        self._purpose, self._chunk = f"simulation/{task}/{episode}", []

    @torch.no_grad()
    def act(self, observation: Mapping[str, Any], step: int) -> np.ndarray:
        if not self._chunk:
            state = observation["observation.state"]
            tokens = np.full(self._model.tokenizer_max_length, self._tokens.pad_token_id, dtype=np.int64)
            ids = self._tokens(observation["task"])
            tokens[: len(ids)] = ids
            batch = {
                "observation.image": torch.from_numpy(observation["observation.image"]).permute(2, 0, 1)[None].float()
                / 255,
                "observation.state": torch.from_numpy(self._state.normalize(state))[None],
                "observation.language.tokens": torch.from_numpy(tokens)[None],
                "observation.language.attention_mask": torch.from_numpy(np.arange(len(tokens)) < len(ids))[None],
            }
            shape = (1, self._model.chunk_size, self._model.max_action_dim)
            noise = stream(self._seed, f"{self._purpose}/noise", step).standard_normal(shape, dtype=np.float32)
            chunk = self._policy.predict_action_chunk(batch, noise=torch.from_numpy(noise))[0].float().numpy()
            self._chunk = list(self._decode(chunk, state)[: self._model.action_steps])
        return self._chunk.pop(0)


def _sentences() -> list[str]:
    from agent.simulation.metaworld import TASK_DESCRIPTIONS

    return sorted(set(TASK_DESCRIPTIONS.values()))


def play(options: argparse.Namespace) -> None:
    """Plays what is missing and prints the table."""
    from agent.simulation.evaluation import Request, play_missing
    from agent.simulation.results import ResultsFolder, table

    out = Path(options.out)
    facts = json.loads((out / f"facts_{options.updates}.json").read_text(encoding="utf-8"))
    config, data = read(facts["config"][0], facts["config"][1:])
    model: Any = config.model_cfg
    policy = make_policy(model, data)
    policy.load_state_dict(torch.load(out / f"policy_{options.updates}.pt", weights_only=True))
    request = Request(tuple(options.tasks.split(",")), options.episodes, options.seed)
    height, width = model.image_resolution
    settings = {"policy": f"{out}, update {options.updates}", "seed": request.seed, "max_steps": request.max_steps}
    results = ResultsFolder(out / f"simulation_{options.updates}_seed_{options.seed}", settings)
    torch.set_num_threads(1)
    play_missing(request, results, LeRobotActor(policy, model, data, request.seed), height, width)
    print(table(results.summarize(request.tasks, request.episodes)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "play"])
    parser.add_argument("--config_path", default="config/train/pi0_metaworld.yaml")
    parser.add_argument("--updates", type=int, default=10000, help="where training ends, or whose weights are to play")
    parser.add_argument("--save_every", type=int, default=1000)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tasks", default="reach-v3,button-press-topdown-v3")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1000, help="of noise; episode e starts from seed + e")
    options, options.changes = parser.parse_known_args()
    if options.changes and options.what == "play":
        parser.error(f"unknown: {' '.join(options.changes)}; what was trained is in --out")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.what == "play":
        from agent.simulation.rendering import choose_backend

        choose_backend()
    (train if options.what == "train" else play)(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
