"""What reading samples costs, side by side with LeRobot's own reader on the same data.

    uv run python benchmarks/loader.py

Writes synthetic videos with the statistics of natural pictures (amplitude falling with the frequency as in photographs,
moving objects with sharp edges, sensor noise), H.264 with LeRobot's settings, 224 × 224, one and two cameras, and prepares frame
stores of them. Then, pinned to one core and in turn: samples in random order with chunks of 16 actions, from LeRobot's
`LeRobotDataset` with both decoders (items as they are), and from this project's loader (whole batches, with noise, tokens
and normalisation) without a store and with each kind. Also: preparing against plain sequential decoding with PyAV, PSNR of
the stored pictures against LeRobot's decoded and the model's resized ones, and the share of time that a consumer of 45
samples a second waits. Speeds are per second of processor time of one core, so that other programs on the machine disturb
little; medians of the rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CHUNK, DIMS, FPS, SIZE = 16, 7, 10, 224
KINDS = ("jpeg", "lossless", "raw")


# ---- data


def texture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A periodic (height, width, 3) float picture, strong in brightness, weaker in colour."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    # Photographs have 0.8 to 1.5 here (van der Schaaf and van Hateren, 1996). They also have smooth places, this has none.
    amplitude = np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** -1.2
    planes = []
    for deviation in (48.0, 14.0, 14.0):
        plane = np.fft.ifft2(np.fft.fft2(generator.standard_normal((height, width))) * amplitude).real
        planes.append(deviation * (plane - plane.mean()) / plane.std())
    brightness, blue, red = planes
    return 120 + np.stack([brightness + red, brightness - (blue + red) / 2, brightness + blue], axis=-1)


def scene(generator: np.random.Generator, height: int, width: int, frames: int) -> Iterator[np.ndarray]:
    """(height, width, 3) uint8 pictures: a background that moves slowly and objects in front of it."""
    background = texture(generator, height * 2, width * 2)
    objects = [
        (texture(generator, height, width) + generator.uniform(-60, 60, 3), *generator.uniform(0.1, 0.9, 2), *way)
        for way in generator.uniform(-0.01, 0.01, (6, 2))
    ]
    noise = generator.normal(0, 1.5, (height * width, 3))
    rows, columns = np.mgrid[0:height, 0:width]
    for number in range(frames):
        picture = np.roll(background, (-number, -2 * number), axis=(0, 1))[:height, :width].copy()
        for surface, y, x, vy, vx in objects:
            centre = (((y + vy * number) % 1) * height, ((x + vx * number) % 1) * width)
            inside = np.hypot(rows - centre[0], columns - centre[1]) < height / 9
            picture[inside] = surface[inside]
        picture += np.roll(noise, generator.integers(height * width), axis=0).reshape(picture.shape)
        yield picture.clip(0, 255).astype(np.uint8)


def write_dataset(root: Path, cameras: int, size: tuple[int, int], episodes: int, length: int) -> Path:
    """A LeRobot data set with H.264 videos."""
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    vector = {"dtype": "float32", "shape": (DIMS,), "names": None}
    picture = {"dtype": "video", "shape": (*size, 3), "names": ["height", "width", "channels"]}
    names = [f"observation.images.{number}" for number in range(cameras)]
    dataset = LeRobotDataset.create(
        "benchmark/loader",
        fps=FPS,
        root=root,
        features={"observation.state": vector, "action": vector, **dict.fromkeys(names, picture)},
        rgb_encoder=RGBEncoderConfig(vcodec="h264"),
    )
    generator = np.random.default_rng(0)
    for _ in range(episodes):
        for pictures in zip(*(scene(generator, *size, length) for _ in names), strict=True):
            values = generator.standard_normal((2, DIMS)).astype(np.float32)
            item: dict[str, Any] = {"observation.state": values[0], "action": values[1], "task": "move the object"}
            dataset.add_frame(item | dict(zip(names, pictures, strict=True)))
        dataset.save_episode()
    dataset.finalize()
    return root


# ---- the two readers


def built(root: Path, store: str, workers: int = 0) -> Any:
    """This project's data of a run."""
    from agent.batch import Prompt, SampleSpec
    from agent.data.build import build_data
    from agent.data.configuration import DataConfig, DatasetConfig, TrainDataConfig, ValDataConfig
    from agent.data.normalization.robot_statistics import Normalization
    from agent.data.samples.wording import Wording
    from agent.models.flow_matching import FlowSampling
    from agent.models.pi.prompt import with_newline

    draw = FlowSampling(0, "train", (CHUNK, 32), beta=(1.5, 1.0), scale=0.999, offset=0.001)
    datasets = [DatasetConfig("benchmark/loader", str(root))]
    train = TrainDataConfig(datasets, num_workers=workers, frame_store=store)  # type: ignore[arg-type]
    return build_data(
        DataConfig(train, ValDataConfig(fraction=0)),
        SampleSpec(CHUNK, 32, 32, (SIZE, SIZE), 48),
        seed=0,
        draw=draw,
        validation_draw=draw,
        normalization=Normalization({"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}),
        wording=Wording(Prompt(str(ROOT / "demo" / "tokenizer"), 48, with_newline, 257152, "vocab_size")),
    )


def our_loader(root: Path, store: str, workers: int = 0) -> Any:
    """Batches of 32 for ever."""
    from agent.data.loading.loader import TrainLoader

    data = built(root, store, workers)
    return TrainLoader(data.reader, data.mixture, per_device_batch=32, num_workers=workers)


def ours(root: Path, store: str) -> Callable[[int], int]:
    """Reads at least so many samples and says how many."""
    loader = our_loader(root, store)
    return lambda count: sum(len(next(loader)) for _ in range(-(-count // 32)))


def lerobots(root: Path, backend: str) -> Callable[[int], int]:
    """The same with LeRobot."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    steps = {"action": [step / FPS for step in range(CHUNK)]}
    dataset = LeRobotDataset(
        "benchmark/loader", root=root, delta_timestamps=steps, video_backend=backend, return_uint8=True
    )
    generator = np.random.default_rng(1)

    def read(count: int) -> int:
        for index in generator.integers(len(dataset), size=count).tolist():
            dataset[index]
        return count

    return read


# ---- measurements


def speeds(contenders: dict[str, Callable[[int], int]], rounds: int, seconds: float) -> dict[str, float]:
    """Work per second of processor time, medians over rounds in which each has its turn."""
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for read in contenders.values():
        read(64)
    for _ in range(rounds):
        for name, read in contenders.items():
            done, begin = 0, time.process_time()
            while time.process_time() - begin < seconds:
                done += read(64)
            results[name].append(done / (time.process_time() - begin))
    return {name: statistics.median(values) for name, values in results.items()}


def preparing(root: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Frames per second: plain sequential decoding, and all that preparing does to a file, on one core."""
    import av

    from agent.data.frames.parts import write_part
    from agent.data.frames.preparation import Preparation
    from agent.data.frames.times import index_file

    videos = sorted(root.glob("videos/*/*/*.mp4"))

    def plain(_: int) -> int:
        done = 0
        for path in videos:
            with av.open(str(path)) as container:
                done += sum(len(frame.to_ndarray(format="rgb24")) > 0 for frame in container.decode(video=0))
        return done

    def prepared(work: Preparation, _: int) -> int:
        done = 0
        for job in work.jobs:
            for part in work.parts(job, index_file(job.path, job.video)):
                part.target.parent.mkdir(parents=True, exist_ok=True)
                done += write_part(part).frames
        return done

    works = {}
    for kind in KINDS:
        source, wanted = opened(root, kind)
        source.config.frames = str(folder / kind)
        works[kind] = partial(prepared, Preparation(source, wanted))
    return speeds({"plain": plain, **works}, rounds, 0.01)


def opened(root: Path, kind: str) -> tuple[Any, Any]:
    """A data set with all its cameras, and the store that is wanted of it."""
    from agent.data.configuration import DatasetConfig, TrainDataConfig
    from agent.data.frames.store import WantedStore
    from agent.data.source import open_source

    source = open_source(DatasetConfig("benchmark/loader", str(root)), CHUNK, "pyav", 1e-4)
    source.cameras = {key: key for key in source.metadata.camera_keys}
    return source, WantedStore(kind, TrainDataConfig().frame_quality, (SIZE, SIZE))  # type: ignore[arg-type]


def make_store(root: Path, kind: str) -> None:
    """As `python -m agent.data.prepare` does, in this process's children."""
    from agent.data.frames.making import prepare

    source, wanted = opened(root, kind)
    prepare(source, wanted, skip_bad_episodes=False, workers=len(os.sched_getaffinity(0)))


def fidelity(root: Path, kind: str, count: int = 64) -> tuple[float, bool]:
    """Lowest PSNR in dB over some pictures, and whether all are the same, against LeRobot's decode and our resize."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from agent.data.frames.store import find_store
    from agent.data.resizing import resize_with_pad

    source, wanted = opened(root, kind)
    store = find_store(source.metadata, None, wanted, source.episodes)
    assert store is not None
    dataset = LeRobotDataset("benchmark/loader", root=root, return_uint8=True)
    worst, same = float("inf"), True
    for position in np.linspace(0, len(source) - 1, count).astype(int).tolist():
        item = dataset[position]
        for key in source.cameras:
            theirs = resize_with_pad(item[key], SIZE, SIZE).numpy()
            stored = store.image(key, *source.frame(position))
            error = float(np.mean((theirs.astype(np.float64) - stored) ** 2))
            same = same and error == 0
            worst = min(worst, 10 * np.log10(255**2 / error) if error else float("inf"))
    return worst, same


def data_wait(root: Path, store: str, workers: int, rate: float, seconds: float) -> tuple[float, float]:
    """What a consumer sees that works on each sample for 1/rate s.

    Returns:
        The share of its time that it waits for its batches, and the seconds of processor time that a batch costs its
        process.
    """
    loader = our_loader(root, store, workers)
    for _ in range(4):
        next(loader)
    waited, batches, begin, begin_cpu = 0.0, 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        batches += 1
        time.sleep(len(batch) / rate)
    share, cost = waited / (time.perf_counter() - begin), (time.process_time() - begin_cpu) / batches
    loader.close()
    return share, cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=6)
    parser.add_argument("--length", type=int, default=80, help="frames of an episode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a contender's turn")
    parser.add_argument("--workers", type=int, default=8, help="of the consumer that sleeps")
    parser.add_argument("--rate", type=float, default=45.0, help="samples a second of the consumer")
    parser.add_argument("--folder", type=Path, help="for the data, which is kept; a temporary one when not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("HF_DATASETS_CACHE", temporary)
        measure(arguments, arguments.folder or Path(temporary))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Everything, printed as it is known."""
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    sizes = {
        "one camera, 224": (1, (SIZE, SIZE)),
        "two cameras, 224": (2, (SIZE, SIZE)),
        "one camera, 640×480": (1, (480, 640)),
    }
    roots = {}
    for name, (cameras, size) in sizes.items():
        root = folder / f"{cameras}x{size[0]}"
        roots[name] = (
            root if root.exists() else write_dataset(root, cameras, size, arguments.episodes, arguments.length)
        )
        for kind in KINDS:
            make_store(root, kind)
    report(f"\n{'pictures against LeRobot’s':<36}", *(f"{kind:>12}" for kind in KINDS))
    for name, root in roots.items():
        results = [fidelity(root, kind) for kind in KINDS]
        report(f"{name:<36}", *(f"{'identical' if same else f'{worst:.1f} dB':>12}" for worst, same in results))
    waits = {
        kind: data_wait(roots["one camera, 224"], kind, arguments.workers, arguments.rate, 8)
        for kind in ("jpeg", "raw")
    }
    report(
        f"\nat {arguments.rate:g} samples/s, {arguments.workers} workers: "
        + "; ".join(
            f"{kind} waits {share:.2%}, {1000 * cost:.1f} ms of the consumer’s processor per batch"
            for kind, (share, cost) in waits.items()
        )
    )

    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    report(f"\n{'preparing, frames/s per core':<36}", f"{'plain PyAV':>12}", *(f"{kind:>12}" for kind in KINDS))
    for name, root in roots.items():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            found = preparing(root, Path(scratch), arguments.rounds)
        plain = found.pop("plain")
        report(f"{name:<36}", f"{plain:>12.0f}", *(f"{v:>6.0f} {v / plain:>4.2f}×" for v in found.values()))

    summary: dict[str, Any] = {}
    heads = ("LeRobot pyav", "torchcodec", "ours, no store", *KINDS)
    report(f"\n{'samples/s per core':<36}", *(f"{head:>14}" for head in heads), "   ratio jpeg, raw")
    for name, root in roots.items():
        contenders = {"pyav": lerobots(root, "pyav"), "torchcodec": lerobots(root, "torchcodec")}
        contenders |= {kind: ours(root, kind) for kind in ("none", *KINDS)}
        found = speeds(contenders, arguments.rounds, arguments.seconds)
        peer = max(("pyav", "torchcodec"), key=lambda backend: found[backend])
        ratios = {kind: found[kind] / found[peer] for kind in KINDS}
        report(
            f"{name:<36}", *(f"{v:>14.0f}" for v in found.values()), f"   {ratios['jpeg']:.1f}×, {ratios['raw']:.1f}×"
        )
        summary = summary or {
            "ratio_jpeg": round(ratios["jpeg"], 2),
            "ratio_raw": round(ratios["raw"], 2),
            "samples_per_s": round(found["jpeg"], 1),
            "peer_samples_per_s": round(found[peer], 1),
            "peer_backend": peer,
        }
    print(json.dumps(summary))


def report(*columns: str) -> None:
    """A line, at once."""
    print(*columns, flush=True)


if __name__ == "__main__":
    sys.exit(main())
