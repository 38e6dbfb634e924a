"""Records the scripted experts of Meta-World into a LeRobot data set (format v3).

    uv run --extra sim python scripts/record_metaworld.py --tasks button-press-topdown-v3 --episodes 60 --out demo/metaworld

recorded the data of the demo. The extra `sim` brings metaworld and mujoco. Rendering without a display needs, on Debian
or Ubuntu,

    apt-get install libegl1 libgl1-mesa-dri libgles2 libosmesa6 ffmpeg

and MUJOCO_GL=egl (taken when the variable is unset) or MUJOCO_GL=osmesa.

The episodes take turns over the tasks: episode e belongs to task e mod n, so that held-out episodes spaced evenly
cover all of them (as long as the spacing and n have no common divisor). Every step is recorded until the expert has
succeeded, and a few more. An episode in which the expert fails is dropped and recorded again with the next
environment seed. The same arguments give the same episodes, and with the same versions of the libraries the same
files.

The camera, its place and its orientation are those of LeRobot's own Meta-World environment. Shadows are off: they
take nine tenths of the time. An environment that evaluates a policy trained on these images must switch them off
as well; agent.evaluate_sim renders with the same code.

With --fingers, --noise and --after the demonstrations teach more than the expert's straight way: see
docs/simulation.md, which has the commands for config/train/pi0_metaworld.yaml.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.simulation.rendering import Camera, choose_backend, import_simulator, settle

log = logging.getLogger("record_metaworld")

DEFAULT_TASKS = "reach-v3,button-press-topdown-v3,drawer-open-v3"
LOWEST_SEED = 100_000  # lerobot-eval counts its seeds upwards from 1000: keep well clear of them
FRAMES_AFTER_SUCCESS = 5
FAILURES_IN_A_ROW = 10
GOAL = slice(36, 39)  # of an observation
MEMORY = 0.9  # of a disturbance, from step to step
WORST_MEAN_ERROR = 8.0  # grey levels between the rendered and the decoded frame; h264 at crf 23 gives about 5

STATE_NAMES = ["x", "y", "z", "gripper"]
ACTION_NAMES = ["dx", "dy", "dz", "gripper"]


@dataclass
class Recorded:
    """What --verify compares with the data set that was written."""

    task: str
    seed: int
    frames: int
    first_image: np.ndarray
    last_image: np.ndarray
    actions: np.ndarray


class Scene:
    """One Meta-World task: its simulation, its expert and its camera."""

    def __init__(self, task: str, size: int):
        import metaworld
        from metaworld.policies import ENV_POLICY_MAP

        # As LeRobot's environment does it: one fixed task, and then a start drawn from the seed at every reset.
        benchmark = metaworld.MT1(task, seed=42)
        self.env = benchmark.train_classes[task](width=size, height=size)
        self.env.set_task(benchmark.train_tasks[0])
        self.env.reset()
        self.env._freeze_rand_vec = False
        self.env.seeded_rand_vec = True
        self.expert = ENV_POLICY_MAP[task]()

        self.camera = Camera(self.env, size, size)

    def reset(self, seed: int) -> np.ndarray:
        self.env.seed(seed)  # env.reset ignores the seed it is given
        self.env.reset()
        return settle(self.env)

    def image(self) -> np.ndarray:
        return self.camera.image()

    def action(self, observation: np.ndarray, fingers: bool) -> np.ndarray:
        if fingers:
            observation = observation.copy()
            observation[GOAL] += observation[:3] - self.env.tcp_center
        return np.clip(self.expert.get_action(observation), -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        self.camera.close()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; must not exist yet")
    parser.add_argument("--tasks", default=DEFAULT_TASKS, help=f"separated by commas; default {DEFAULT_TASKS}")
    parser.add_argument("--episodes", type=int, default=20, help="per task; default 20")
    parser.add_argument(
        "--after",
        type=int,
        default=FRAMES_AFTER_SUCCESS,
        help=f"steps recorded after the first success; default {FRAMES_AFTER_SUCCESS}",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="standard deviation of a disturbance of what is executed; recorded is what the expert wanted, so that the "
        "data shows how to come back (DART, https://arxiv.org/abs/1703.09327); default 0",
    )
    parser.add_argument(
        "--fingers",
        action="store_true",
        help="the expert steers the fingers to the goal that it sees in its observation; otherwise the wrist, 4 cm above",
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="keep every frame as it was rendered, as PNG, instead of h264 video: twenty times the space",
    )
    parser.add_argument("--size", type=int, default=128, help="width and height of the images; default 128")
    parser.add_argument(
        "--seed",
        type=int,
        default=LOWEST_SEED,
        help=f"of the first episode's environment, counted upwards from there; default {LOWEST_SEED}",
    )
    parser.add_argument(
        "--fps",
        type=int,
        default=80,
        help="written into the data set; every step is recorded whatever it says. The simulation runs at 80",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="decode the first and last frame of every episode and compare them with the rendered ones",
    )
    arguments = parser.parse_args(argv)
    arguments.tasks = [task.strip() for task in arguments.tasks.split(",") if task.strip()]
    return arguments


def check_arguments(arguments: argparse.Namespace, known_tasks: dict[str, str]) -> None:
    """Everything that can be wrong with the command line, before the first simulation is built."""
    if not arguments.tasks:
        raise ValueError("--tasks names no task; leave it out for the default")
    for task in arguments.tasks:
        if task not in known_tasks:
            raise ValueError(f"--tasks: {task!r} is not one of {', '.join(sorted(known_tasks))}")
    if len(set(arguments.tasks)) < len(arguments.tasks):
        raise ValueError("--tasks names a task twice; raise --episodes instead")
    for name in ("episodes", "fps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    if arguments.after < 0 or not 0 <= arguments.noise <= 2:
        raise ValueError(f"--after must be at least 0 (is {arguments.after}), --noise 0 to 2 (is {arguments.noise})")
    if arguments.size < 32 or arguments.size % 2:
        raise ValueError(f"--size must be even (h264 wants it) and at least 32, not {arguments.size}")
    if arguments.seed < LOWEST_SEED:
        raise ValueError(f"--seed must be at least {LOWEST_SEED}, not {arguments.seed}: evaluation uses the lower ones")
    if arguments.out.exists():
        raise ValueError(f"--out: {arguments.out} exists already; remove it or name another folder")


def features(size: int, images: bool) -> dict[str, dict]:
    dtype = "image" if images else "video"
    return {
        "observation.image": {"dtype": dtype, "shape": (size, size, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (4,), "names": STATE_NAMES},
        "action": {"dtype": "float32", "shape": (4,), "names": ACTION_NAMES},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }


def create_dataset(arguments: argparse.Namespace):
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    common = {
        "repo_id": "/".join(arguments.out.resolve().parts[-2:]),
        "root": arguments.out,
        "fps": arguments.fps,
        "robot_type": "sawyer",
        "features": features(arguments.size, arguments.images),
    }
    if arguments.images:
        return LeRobotDataset.create(use_videos=False, **common)
    return LeRobotDataset.create(
        use_videos=True,
        streaming_encoding=True,
        encoder_queue_maxsize=600,  # more than an episode has steps: a full queue drops frames
        encoder_threads=1,  # the encoder's output depends on its number of threads
        # A key frame every second frame: training reads frames in random order.
        rgb_encoder=RGBEncoderConfig(vcodec="h264", pix_fmt="yuv420p", g=2, crf=23, preset="veryfast"),
        **common,
    )


class Disturbance:
    """What is added to the action that is executed: slow enough to lead astray (an Ornstein-Uhlenbeck process)."""

    def __init__(self, deviation: float, seed: int):
        self.deviation = deviation
        self.random = np.random.default_rng(seed)
        self.value = np.zeros(4, np.float32)

    def disturb(self, action: np.ndarray) -> np.ndarray:
        if not self.deviation:
            return action
        draw = self.deviation * self.random.standard_normal(3).astype(np.float32)
        self.value[:3] = MEMORY * self.value[:3] + (1 - MEMORY**2) ** 0.5 * draw  # never the gripper
        return np.clip(action + self.value, -1.0, 1.0)


def record_episode(
    dataset, scene: Scene, task: str, sentence: str, seed: int, arguments: argparse.Namespace
) -> Recorded | None:
    """Adds the frames of one episode to the data set's buffer; None when the expert did not succeed."""
    observation = scene.reset(seed)
    disturbance = Disturbance(arguments.noise, seed)
    images, actions = [], []
    frames_left = None  # counted from the first success on
    for _ in range(scene.env.max_path_length):
        images.append(scene.image())
        actions.append(scene.action(observation, arguments.fingers))
        state = observation[:4].astype(np.float32)
        observation, reward, _, _, info = scene.env.step(disturbance.disturb(actions[-1]))
        success = bool(info["success"])
        dataset.add_frame(
            {
                "observation.image": images[-1],
                "observation.state": state,
                "action": actions[-1],
                "next.reward": np.array([reward], dtype=np.float32),
                "next.success": np.array([success]),
                "task": sentence,
            }
        )
        if success and frames_left is None:
            frames_left = arguments.after + 1
        if frames_left is not None:
            frames_left -= 1
            if frames_left == 0:
                break
    if frames_left is None:
        return None
    return Recorded(task, seed, len(images), images[0], images[-1], np.stack(actions))


def record(arguments: argparse.Namespace, sentences: dict[str, str]) -> tuple[list[Recorded], dict[str, int]]:
    """Records all episodes; returns them in order, and the number of failed attempts per task."""
    scenes = {task: Scene(task, arguments.size) for task in arguments.tasks}
    try:
        return record_episodes(arguments, sentences, scenes)
    finally:
        for scene in scenes.values():
            scene.close()


def record_episodes(
    arguments: argparse.Namespace, sentences: dict[str, str], scenes: dict[str, Scene]
) -> tuple[list[Recorded], dict[str, int]]:
    dataset = create_dataset(arguments)
    recorded: list[Recorded] = []
    failures = dict.fromkeys(arguments.tasks, 0)
    failures_in_a_row = 0
    seed = arguments.seed
    while len(recorded) < arguments.episodes * len(arguments.tasks):
        task = arguments.tasks[len(recorded) % len(arguments.tasks)]
        episode = record_episode(dataset, scenes[task], task, sentences[task], seed, arguments)
        seed += 1
        if episode is None:
            dataset.clear_episode_buffer()
            failures[task] += 1
            failures_in_a_row += 1
            log.warning("%s: the expert failed with seed %d, trying the next one", task, seed - 1)
            if failures_in_a_row == FAILURES_IN_A_ROW:
                raise RuntimeError(
                    f"the expert of {task} failed {FAILURES_IN_A_ROW} times in a row: is the installed metaworld the "
                    f"one that the extra `sim` names? {arguments.out} is incomplete, remove it."
                )
            continue
        failures_in_a_row = 0
        dataset.save_episode()
        recorded.append(episode)
        log.info("episode %3d  %-26s seed %d  %3d frames", len(recorded) - 1, task, episode.seed, episode.frames)
    dataset.finalize()  # without it the parquet files have no footer and cannot be read
    # LeRobot writes the statistics in the order of a set; sorted, the same arguments give the same files.
    statistics = arguments.out / "meta" / "stats.json"
    statistics.write_text(json.dumps(json.loads(statistics.read_text()), indent=4, sort_keys=True))
    return recorded, failures


def open_dataset(out: Path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset(repo_id="/".join(out.resolve().parts[-2:]), root=out, video_backend="pyav")


def verify(dataset, recorded: list[Recorded], sentences: dict[str, str]) -> None:
    """The data set says what the simulation did: images, actions, tasks and successes, episode by episode."""
    rows = dataset.hf_dataset.with_format("numpy")
    worst = 0.0
    for index, episode in enumerate(recorded):
        start = int(dataset.meta.episodes[index]["dataset_from_index"])
        stop = int(dataset.meta.episodes[index]["dataset_to_index"])
        if stop - start != episode.frames:
            raise RuntimeError(f"episode {index} has {stop - start} frames on disk, {episode.frames} were recorded")
        columns = rows[start:stop]
        if not np.array_equal(np.stack(columns["action"]), episode.actions):
            raise RuntimeError(f"episode {index}: the actions on disk are not those that were recorded")
        if not np.any(columns["next.success"]):
            raise RuntimeError(f"episode {index}: no success on disk")
        ends = (start, episode.first_image, episode.last_image), (stop - 1, episode.last_image, episode.first_image)
        for position, rendered, other in ends:
            item = dataset[position]
            if item["task"] != sentences[episode.task]:
                raise RuntimeError(f"episode {index}: task {item['task']!r} instead of {sentences[episode.task]!r}")
            decoded = item["observation.image"].numpy().transpose(1, 2, 0) * 255
            error = float(np.abs(decoded - rendered).mean())
            worst = max(worst, error)
            if error > WORST_MEAN_ERROR or error > np.abs(decoded - other).mean():
                raise RuntimeError(f"episode {index}, frame {position - start}: decoded {error:.1f} grey levels away")
    log.info("verified %d episodes; decoded images at most %.2f grey levels away on average", len(recorded), worst)


def print_summary(dataset, out: Path, failures: dict[str, int], seconds: float) -> None:
    episodes = [dataset.meta.episodes[index] for index in range(dataset.num_episodes)]
    print(f"{out}: {dataset.num_episodes} episodes, {dataset.num_frames} frames at {dataset.fps} fps", end=", ")
    print(f"{sum(file.stat().st_size for file in out.rglob('*') if file.is_file()) / 1e6:.2f} MB, {seconds:.0f} s")
    for sentence in dataset.meta.tasks.index:
        lengths = [episode["length"] for episode in episodes if episode["tasks"][0] == sentence]
        print(f"  {sentence!r}: {len(lengths)} episodes, {sum(lengths)} frames, on average {np.mean(lengths):.1f}")
    print(f"  failed attempts, dropped: {', '.join(f'{task} {count}' for task, count in failures.items())}")
    for key in ("observation.state", "action"):
        statistics = dataset.meta.stats[key]
        for name in ("mean", "std", "min", "max"):
            values = " ".join(f"{value:8.4f}" for value in np.asarray(statistics[name]).ravel())
            print(f"  {key:<18} {name:<5}{values}")


def silence_libraries() -> None:
    """The encoder's report of every episode, and the experts' warning that their actions want clipping."""
    import av
    import datasets

    av.logging.set_libav_level(av.logging.WARNING)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    choose_backend()
    arguments = parse_arguments()
    try:
        import_simulator()
        from lerobot.envs.metaworld import TASK_DESCRIPTIONS

        check_arguments(arguments, TASK_DESCRIPTIONS)
    except ModuleNotFoundError as error:
        print(f"{error}\nInstall the extra: uv run --extra sim python {sys.argv[0]} …", file=sys.stderr)
        print("and the Debian packages named at the top of this file.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    silence_libraries()
    start = time.monotonic()
    recorded, failures = record(arguments, TASK_DESCRIPTIONS)
    seconds = time.monotonic() - start
    dataset = open_dataset(arguments.out)
    if arguments.verify:
        verify(dataset, recorded, TASK_DESCRIPTIONS)
    print_summary(dataset, arguments.out, failures, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
