"""Two small data sets and a tokenizer, written once; a test that changes one copies it first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.datasets import write_dataset, write_tokenizer
from support.samples import FRONT, WRIST, built, dataset_config


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keeps the Arrow copies of these data sets out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def video(folder):
    """Four episodes of 12 frames, one camera as video."""
    return write_dataset(folder / "video")


@pytest.fixture(scope="session")
def pictures(folder):
    """Three episodes of different lengths, two cameras as PNG."""
    sizes = {FRONT: (32, 48), WRIST: (48, 48)}
    return write_dataset(folder / "pictures", episodes=3, length=[3, 9, 6], cameras=sizes, video=False, seed=1)


@pytest.fixture(scope="session")
def tokenizer(folder):
    return str(write_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="session")
def data(video, pictures, tokenizer, cache):
    """Both data sets mixed; the second one's wrist camera is left out."""
    configs = [dataset_config(video, weight=1.0), dataset_config(pictures, weight=3.0, cameras={FRONT: FRONT})]
    return built(*configs, tokenizer=tokenizer)


@pytest.fixture
def copy(place, tmp_path) -> Path:
    """A copy of the place's data set, without any store of its frames."""
    shutil.copytree(place.folder / "data", tmp_path / "data", ignore=shutil.ignore_patterns("frames", "agent_cache"))
    return tmp_path / "data"
