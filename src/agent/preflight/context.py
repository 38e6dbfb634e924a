"""Holds what the checks share: the config, what the job will get, and the data. Each is looked at once."""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from agent.batch import EMPTY_CAMERA
from agent.preflight import needs
from agent.preflight.report import NotChecked
from agent.preflight.slurm import Job, find_job
from agent.preflight.survey import Survey, survey
from agent.settings.gpus import GPUS, Gpu, recognised

if TYPE_CHECKING:
    from agent.batch import SampleSpec
    from agent.checkpoints.store import CheckpointStore
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.data.build import Data
    from agent.models.lerobot_config import TrainableConfig
    from agent.parallel.launch import Launch

REPOSITORY = Path(__file__).resolve().parents[3]
STAND_IN = REPOSITORY / "demo" / "tokenizer"
"""Takes the place of a tokenizer that is not here, so that what needs no words is checked all the same."""


@dataclass
class Rehearsal:
    """The measurements of a real update."""

    device: str
    samples: int
    """How many samples a micro-batch had."""
    micro_batch_s: float


@dataclass
class Context:
    """Answers everything that a check may ask."""

    config: TrainPipelineConfig
    launch: Launch
    started: float = field(default_factory=time.time)
    rehearsal: Rehearsal | None = None
    """The check that makes an update sets it."""
    waiting: float = 0.0
    """Fraction of the time that training would wait for data read as fast as here; the check of the loader sets it."""

    @property
    def model(self) -> TrainableConfig:
        """The model's config."""
        return self.config.trainable

    @property
    def spec(self) -> SampleSpec:
        """What the model wants of a sample."""
        return self.config.family.sample_spec(self.model)

    @cached_property
    def folder(self) -> Path:
        """The folder ``check`` in the run folder, made if it is not there.

        Raises:
            NotChecked: if it cannot be made.
        """
        folder = self.config.run_dir / "check"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotChecked("the run folder cannot be written") from error
        return folder

    # ---- the run

    @cached_property
    def store(self) -> CheckpointStore:
        """The run's own checkpoints, which are only looked at."""
        from agent.checkpoints.store import CheckpointStore

        return CheckpointStore(self.config.run_dir, self.config.keep_checkpoints, self.config.keep_training_states)

    @cached_property
    def own(self) -> tuple[list[Path], dict[Path, str]]:
        """The checkpoints to continue from, the newest first; and those whose files have wrong sizes, with what is damaged."""
        from agent.checkpoints.manifest import check_sizes

        damages = {path: check_sizes(path) for path in self.store.candidates()}
        whole = [path for path, damage in damages.items() if damage is None]
        return whole, {path: damage for path, damage in damages.items() if damage is not None}

    # ---- the job

    @cached_property
    def job(self) -> Job | None:
        """What the job will get, as far as SLURM or the script with the run's name says it."""
        assert self.config.name is not None
        return find_job(self.config.name, [Path.cwd(), REPOSITORY], time.time())

    @cached_property
    def visible_gpus(self) -> list[str]:
        """The device names of this machine's GPUs; none if the config asks for the CPU."""
        import torch

        if self.model.device == "cpu":
            return []
        return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]

    @property
    def submits(self) -> bool:
        """Whether the run will be a job of SLURM, so that its script says more than this machine."""
        return self.job is not None and ("SLURM_JOB_ID" in os.environ or shutil.which("sbatch") is not None)

    @cached_property
    def gpus(self) -> tuple[int, str]:
        """How many GPUs the job will have, with one process each, and who says so."""
        if self.launch.under_torchrun:
            return self.launch.world_size, "torchrun"
        asked = [(self.job.gpus, self.job.source)] if self.job is not None and self.job.gpus else []
        here = [(len(self.visible_gpus), "the GPUs here")] if self.visible_gpus else []
        known = asked + here if self.submits else here + asked
        return known[0] if known else (1, "no GPU here, and no SLURM script asks for one")

    @cached_property
    def kinds(self) -> tuple[list[Gpu], str]:
        """The kinds of GPU that the job may get, and who says so; no kind if it is not known."""
        if self.config.check_gpu is not None:
            return [GPUS[self.config.check_gpu]], "check_gpu"
        words = self.job.gpu_words if self.job is not None else []
        asked = {gpu.name: gpu for word in words for gpu in recognised(word)}
        if self.visible_gpus and not (self.submits and asked):
            return [self._gpu_here()], "the GPU here"
        return (list(asked.values()), self.job.source) if asked and self.job is not None else ([], "")

    def _gpu_here(self) -> Gpu:
        """The first visible GPU with its own memory: it can be a slice of a larger one."""
        import torch

        name, memory = self.visible_gpus[0], torch.cuda.get_device_properties(0).total_memory
        known = recognised(name)
        return replace(known[0], memory=memory) if known else Gpu(name, memory, 0.0, 0.0, True, ())

    # ---- the data

    @cached_property
    def surveys(self) -> list[Survey]:
        """The survey of each data set; those to train on come first."""
        from agent.training.config_changes import began_with

        known = began_with(self.own[0])
        return [survey(key, dataset, self.config, known) for key, dataset in needs.data_sets(self.config)]

    @cached_property
    def tokenizer_problem(self) -> ValueError | None:
        """Why the tokenizer cannot be loaded; None if it can."""
        try:
            if (item := needs.tokenizer(self.config)) is not None:
                item.look()
        except ValueError as error:
            return error
        return None

    @cached_property
    def usable(self) -> TrainPipelineConfig:
        """The config without the episodes that cannot be read, and with a tokenizer, so that the rest can be checked.

        Raises:
            NotChecked: if a data set cannot be used at all.
        """
        config = copy.deepcopy(self.config)
        for (key, dataset), found in zip(needs.data_sets(config), self.surveys, strict=True):
            if found.source is None or found.mismatch is not None:
                raise NotChecked(f"{key} cannot be used")
            if found.bad:
                dataset.episodes, dataset.split = found.good.tolist(), None
        if self.tokenizer_problem is not None:
            prompt = config.family.prompt(config.trainable)
            assert prompt is not None
            setattr(config.model_cfg, prompt.key, str(STAND_IN))
        return config

    @cached_property
    def _built(self) -> tuple[Data | None, Exception | None]:
        """The data, and why training would refuse them. Both are there if only the paraphrases are refused."""
        try:
            return self._build(), None
        except Exception as error:  # kept, because `data_problem` shows or raises it
            problem = error
        if self.config.task_paraphrase is None or not isinstance(problem, ValueError):
            return None, problem
        try:
            self.usable.task_paraphrase = None
            return self._build(), problem
        except ValueError:
            return None, problem

    def _build(self) -> Data:
        import torch

        from agent.parallel.launch import Launch
        from agent.parallel.processes import Processes
        from agent.training.run_data import build_run_data

        return build_run_data(self.usable, Processes(Launch(), torch.device("cpu")), self.own[0])

    @property
    def data(self) -> Data:
        """The data of the run, as training builds it, without what cannot be read.

        Raises:
            NotChecked: if it cannot be built; ``data_problem`` says why.
        """
        data, problem = self._built
        if data is None:
            raise NotChecked("the data cannot be read") from problem
        return data

    def require_data(self) -> None:
        """Raises NotChecked if the data of the run cannot be read."""
        assert self.data is not None

    def data_problem(self) -> ValueError | None:
        """Says why training would refuse the data sets together, although each of them is usable.

        Raises:
            Exception: what was raised, if it is no mistake of the user's.
        """
        _, problem = self._built
        if isinstance(problem, ValueError):
            return problem
        if problem is not None and not isinstance(problem, NotChecked):
            raise problem
        return None

    @property
    def cameras(self) -> int:
        """How many cameras have an image in at least one data set; all of the model's if that is not known."""
        if not self.spec.images:
            return 0
        slots = {slot for found in self.surveys if found.source is not None for slot in found.source.cameras}
        return len(slots) or len([slot for slot in self.model.camera_slots if not slot.startswith(EMPTY_CAMERA)]) or 1

    @property
    def language_tokens(self) -> int:
        """How many tokens the longest instruction takes in a batch; the model's limit if the data cannot be read."""
        if self._built[0] is None or self.tokenizer_problem is not None:
            return self.spec.tokenizer_max_length
        longest = max(len(self.data.reader.tokens(text)) for text in self.texts)
        return min(-(-longest // 8) * 8, self.spec.tokenizer_max_length)

    @cached_property
    def texts(self) -> list[str]:
        """Every instruction that is trained on, paraphrases included."""
        reader = self.data.reader
        tasks = {task for source in reader.sources for task in source.tasks()}
        return sorted(tasks | {text for task in tasks for text in reader.paraphrases.get(task, [])})

    def model_size(self) -> int:
        """The number of the model's parameters."""
        shapes = self.config.family.names.shapes(self.model)
        return sum(math.prod(shape) for shape in shapes.values())
