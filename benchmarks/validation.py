"""What a validation takes whose samples come through the workers, beside an earlier build of this program.

    git worktree add /tmp/before <commit>
    uv run python benchmarks/validation.py --before /tmp/before

Both builds make the same run of one update, a π0 so small that decoding takes most of the time, on synthetic videos
(`benchmarks/loader.py` writes them: two cameras, 224 × 224), with ``--workers`` data workers. Then they validate in
turn; timed is all that training waits for, record and picture included. A validation begins when the workers have
read training's samples as far ahead as they may, which they have in a training that does not wait for them. The
errors that are found must be the same numbers to rounding. What else the machine does makes both slower: the fastest
of each counts. Where no core is free, Linux may give a run the same share of them however many processes it has, so
that workers gain nothing there; so processor seconds of the training process and of its workers are shown too,
medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 64  # frames of an episode
SMALL = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2, "kv_heads": 1, "head_dim": 16, "vocab_size": 512}
MODEL = {
    "type": "pi0",
    "paligemma_variant": SMALL,
    "action_expert_variant": SMALL,
    "vision_variant": {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2, "patch_size": 32},
    "tokenizer_path": str(ROOT / "demo" / "tokenizer"),
    "image_resolution": [64, 64],
    "chunk_size": 16,
    "num_inference_steps": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the build to compare with")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1024, help="of a validation")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--config", help=argparse.SUPPRESS)  # in a child
    arguments = parser.parse_args()
    if arguments.config is not None:
        validate_when_asked(arguments.config)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Lets the builds take turns, and prints the seconds of each as they are known."""
    from loader import write_dataset

    os.environ.setdefault("HF_DATASETS_CACHE", str(folder / "cache"))
    held_out = -(-arguments.samples // LENGTH)  # and one episode to train on
    data = write_dataset(folder / "data", 2, (224, 224), held_out + 1, LENGTH)
    builds = {"now": ROOT} | ({"before": arguments.before.resolve()} if arguments.before is not None else {})
    runs = {name: started(build, folder, name, data, arguments) for name, build in builds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in builds}
    processor: dict[str, list[list[float]]] = {name: [] for name in builds}
    found: list[dict[str, float]] = []
    for number in range(arguments.rounds + 1):
        for name, run in runs.items():
            assert run.stdin is not None and run.stdout is not None
            run.stdin.write("validate\n")
            run.stdin.flush()
            line = next(line for line in run.stdout if line.startswith("validated "))
            result = json.loads(line.removeprefix("validated "))
            found.append(result["found"])
            if number:  # in the first, videos are opened
                seconds[name].append(result["seconds"])
                processor[name].append(result["processor"])
                own, workers = result["processor"]
                print(f"{name} {result['seconds']:.2f} s, processor {own:.2f} and {workers:.2f}", flush=True)
    for run in runs.values():
        run.communicate()
    # Builds may round differently, where they pad differently for instance.
    same = all(math.isclose(one[name], value, rel_tol=1e-4) for one in found for name, value in found[0].items())
    assert same, "they found other errors"
    summary = {f"{name}_s": min(some) for name, some in seconds.items()}
    for name, some in processor.items():
        own, workers = (statistics.median(values) for values in zip(*some, strict=True))
        summary |= {f"{name}_own_processor_s": own, f"{name}_workers_processor_s": workers}
    if arguments.before is not None:
        summary["ratio"] = summary["before_s"] / summary["now_s"]
    print(json.dumps({name: round(value, 2) for name, value in summary.items()}))


def started(build: Path, folder: Path, name: str, data: Path, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """A run of a build, in a process of its own that validates once for each line that it is sent."""
    config = {
        "name": name,
        "model_cfg": MODEL,
        "data": {
            "train": {
                "datasets": [{"repo_id": "benchmark/loader", "root": str(data)}],
                "num_workers": arguments.workers,
                "frame_store": "none",
            },
            "val": {"fraction": 1 - 1 / (-(-arguments.samples // LENGTH) + 1)},
        },
        "global_batch_size": 32,
        "per_device_batch_size": 32,
        "n_updates": 1,
        "eval_freq": 1,
        "eval_start": False,
        "eval_size": arguments.samples,
        "save_model_freq": 1000,
        "use_wandb": False,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config))
    command = [sys.executable, __file__, "--config", str(folder / f"{name}.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(build / "src"), "VLA_LOG_DIR": str(folder / "runs")}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, bufsize=1
    )


def validate_when_asked(config: str) -> None:
    """Runs what is installed here; its one validation is made again for each line of the standard input."""
    from agent import run
    from agent.training import trainer

    validate = trainer.validate

    def watched(*arguments: Any) -> Any:
        time.sleep(5)  # the workers read ahead
        for _ in sys.stdin:
            begin, busy = time.perf_counter(), processor_seconds()
            found = validate(*arguments)
            seconds = time.perf_counter() - begin
            spent = [after - before for before, after in zip(busy, processor_seconds(), strict=True)]
            print("validated", json.dumps({"seconds": seconds, "processor": spent, "found": found}), flush=True)
        return found

    trainer.validate = watched
    assert run.main(["--config_path", config]) == 0


def processor_seconds() -> tuple[float, float]:
    """What this process has used, and what its workers have."""
    import psutil

    own = psutil.Process()
    times = [some.cpu_times() for some in [own, *own.children(recursive=True)]]
    busy = [some.user + some.system for some in times]
    return busy[0], sum(busy[1:])


if __name__ == "__main__":
    main()
