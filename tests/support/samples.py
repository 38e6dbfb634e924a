"""Opens small data sets and takes samples of them as a training run does."""

from __future__ import annotations

import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np

from agent.batch import Prompt, SampleSpec
from agent.data.build import build_data
from agent.data.configuration import DataConfig, DatasetConfig, TrainDataConfig, ValDataConfig
from agent.data.loading.loader import Share, TrainLoader
from agent.data.normalization.robot_statistics import Normalization
from agent.data.samples.wording import Wording
from agent.data.source import open_source
from agent.models.flow_matching import FlowDraws
from agent.models.pi.prompt import with_newline
from agent.reproducibility import stream

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
SPEC = SampleSpec(
    chunk_size=4,
    max_state_dim=16,
    max_action_dim=10,
    image_resolution=(48, 48),
    tokenizer_max_length=16,
    camera_slots=(FRONT,),
    state_dim=7,
    action_dim=7,
)
MODES = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}


def draw(seed, purpose, k):
    generator = stream(seed, purpose, k)
    return FlowDraws(generator.standard_normal((4, 10)).astype(np.float32), np.float32(generator.random()))


def prompt_of(tokenizer, max_length=SPEC.tokenizer_max_length):
    """π0's prompt with a tokenizer of a test."""
    return Prompt(str(tokenizer), max_length, with_newline, 257152, "vocab_size")


def dataset_config(root, **settings):
    return DatasetConfig(repo_id="test/data", root=str(root), **settings)


def opened(root, **settings):
    source = open_source(dataset_config(root, **settings), SPEC.chunk_size, None, 1e-4)
    source.cameras = {FRONT: FRONT}
    return source


def built(*configs, tokenizer, spec=SPEC, val=None, frame_store="auto", modes=MODES, task_paraphrase=None, **settings):
    arguments = {
        "seed": 5,
        "draw": partial(draw, 5, "noise"),
        "validation_draw": partial(draw, 5, "validation"),
        "normalization": Normalization(modes),
        "wording": Wording(prompt_of(tokenizer), task_paraphrase),
    }
    config = DataConfig(TrainDataConfig(list(configs), num_workers=0, frame_store=frame_store), val or ValDataConfig())
    return build_data(config, spec, **{**arguments, **settings})


def micro_batches(data, count, *, batch, rank=0, world=1, first_sample=0, workers=0):
    loader = TrainLoader(
        data.reader,
        data.mixture,
        per_device_batch=batch,
        share=Share(rank, world, first_sample),
        num_workers=workers,
    )
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def by_number(batches):
    """Everything a batch says of each sample."""
    return {
        int(k): (
            batch.provenance[row].tolist(),
            batch.observation.images[FRONT][row].numpy().tobytes(),
            batch.observation.state[row].tolist(),
            batch.observation.tokens[row][batch.observation.token_mask[row]].tolist(),
            batch.actions.values[row].tolist(),
            batch.actions.is_pad[row].tolist(),
            batch.draws.noise[row].tolist(),
            float(batch.draws.time[row]),
        )
        for batch in batches
        for row, k in enumerate(batch.sample_index)
    }


def broken_draw(k):
    raise RuntimeError(f"no noise for sample {k}")


def lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_with_workers(video, tokenizer):
    """In a process of its own: prints the fork server and its workers, and waits to be killed."""
    data = built(dataset_config(video), tokenizer=tokenizer)
    loader = TrainLoader(data.reader, data.mixture, per_device_batch=4, num_workers=2)
    next(loader)
    print(forkserver._forkserver._forkserver_pid, *worker_processes(), flush=True)
    time.sleep(100)


def worker_processes():
    """The children of the fork server, which is a child of this process."""
    server = forkserver._forkserver._forkserver_pid
    return [int(number) for number in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
