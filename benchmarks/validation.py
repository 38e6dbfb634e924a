"""What a validation takes whose samples come through the workers, beside an earlier build of this program.

    git worktree add /tmp/before <commit>
    uv run python benchmarks/validation.py --before /tmp/before

Both builds make the same run of one update in turn, a π0 so small that decoding takes most of the time, on synthetic videos
(`benchmarks/loader.py` writes them), with ``--workers`` data workers. Timed is the validation after the update, for which
training waits. The errors that it finds must be the same numbers. Medians, and of the ratio over the rounds, so that it depends
little on what else the machine does; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2, "kv_heads": 1, "head_dim": 16, "vocab_size": 512}
MODEL = {
    "type": "pi0",
    "paligemma_variant": SMALL,
    "action_expert_variant": SMALL,
    "vision_variant": {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2, "patch_size": 32},
    "tokenizer_path": str(ROOT / "demo" / "tokenizer"),
    "image_resolution": [224, 224],
    "chunk_size": 16,
    "num_inference_steps": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the build to compare with")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1024, help="of a validation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timed", nargs=2, help=argparse.SUPPRESS)  # in a child: a config, and where the times go
    arguments = parser.parse_args()
    if arguments.timed is not None:
        timed(*arguments.timed)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Lets the builds take turns, and prints what is known so far after each."""
    from loader import write_dataset

    os.environ.setdefault("HF_DATASETS_CACHE", str(folder / "cache"))
    # Two thirds are held out: at least as many frames as are validated with.
    episodes = -(-arguments.samples * 3 // 2 // 64 // 3) * 3
    data = write_dataset(folder / "data", 2, (224, 224), episodes, 64)
    builds = {"now": ROOT} | ({"before": arguments.before.resolve()} if arguments.before is not None else {})
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in builds}
    for number in range(arguments.rounds):
        for name, build in builds.items():
            results[name].append(turn(build, folder, f"{name}-{number}", data, arguments))
            print(name, json.dumps(results[name][-1]), flush=True)
    assert len({json.dumps(one["found"]) for some in results.values() for one in some}) == 1, "they found other errors"
    summary = {f"{name}_s": statistics.median(one["seconds"] for one in some) for name, some in results.items()}
    if arguments.before is not None:
        pairs = zip(results["before"], results["now"], strict=True)
        summary["ratio"] = statistics.median(before["seconds"] / now["seconds"] for before, now in pairs)
    print(json.dumps({name: round(value, 2) for name, value in summary.items()}))


def turn(build: Path, folder: Path, name: str, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of a build, in a process of its own."""
    config = {
        "name": name,
        "model_cfg": MODEL,
        "data": {
            "train": {
                "datasets": [{"repo_id": "benchmark/loader", "root": str(data)}],
                "num_workers": arguments.workers,
                "frame_store": "none",
            },
            "val": {"fraction": 2 / 3},
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
    command = [sys.executable, __file__, "--timed", str(folder / f"{name}.yaml"), str(folder / f"{name}.json")]
    environment = {**os.environ, "PYTHONPATH": str(build / "src"), "VLA_LOG_DIR": str(folder / "runs")}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / f"{name}.json").read_text())


def timed(config: str, target: str) -> None:
    """Runs what is installed here, and writes the seconds of its validation and what it found."""
    from agent import run
    from agent.training import trainer

    result: dict[str, Any] = {}
    validate = trainer.validate

    def watched(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result["found"] = validate(*arguments)
        result["seconds"] = time.perf_counter() - begin
        return result["found"]

    trainer.validate = watched
    assert run.main(["--config_path", config]) == 0
    Path(target).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
