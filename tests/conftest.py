"""Settings for every test: no hub, one thread a process, no run of the user's in reach."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import launching
from support.forked import ForkServer, fork_server
from support.launching import TORCHRUN, Workplace

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}


# The files whose tests take longest, longest first: they begin first, so that no process is left alone with one.
LONGEST = (
    "training/test_training.py", "simulation/test_evaluate_sim.py", "parallel/test_parallelize.py",
    "preflight/test_prepare.py",
    "system/test_reliability.py", "data/frames/test_frame_store.py", "data/loading/test_loader.py",
    "data/conversion/test_from_v2.py", "preflight/test_preflight.py", "preflight/test_preflight_damage.py",
    "optim/test_low_memory_optimizers.py", "training/test_base_weights.py", "system/test_slurm_cluster.py",
    "serving/test_serve.py", "deployment/test_export.py", "data/test_bad_data.py",
    "data/normalization/test_mixed_data.py", "models/pi/test_vintages.py", "optim/test_ema.py",
    "training/test_best.py", "models/pi/test_flow_samples.py", "data/samples/test_augmentation.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU also where there is a GPU, but for those that `-m gpu` asks for."""
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / file: number for number, file in enumerate(LONGEST)}
    assert [path for path in order if not path.is_file()] == []
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()  # under pytest-xdist of this process, in a folder of the session's
    launching.SHARED = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "VLA_LOG_DIR", "VLA_STATUS_FILE", "VLA_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Starts runs of torchrun's kind without importing everything anew."""
    with fork_server() as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A folder with a small data set, a tokenizer and configs."""
    return Workplace.make(tmp_path_factory.mktemp("place"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
