"""Random crops and colours of training pictures. Run: uv run pytest tests/data/samples/test_augmentation.py"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.forked import ForkServer
from support.launching import REPOSITORY, Workplace
from support.samples import FRONT, SPEC, WRIST, built, by_number, dataset_config, micro_batches
from torchvision.transforms.v2 import RandomResizedCrop, functional

from agent.configuration_pipeline import ConfigError, load_config
from agent.data.configuration import AugmentationConfig, CameraAugmentation
from agent.data.frames.making import prepare
from agent.data.frames.store import WantedStore
from agent.data.loading.loader import ValidationBatches
from agent.data.resizing import resize_with_pad
from agent.data.samples.augmentation import Box, Change, augmented, crop, draw_change, picture_box, recoloured
from agent.data.source import open_source

TOKENIZER = str(REPOSITORY / "demo" / "tokenizer")
WHOLE = Box(0, 0, 96, 112)
NOTHING = Change(WHOLE, 1.0, 1.0, 1.0, 0.0)


def photograph(seed: int, height: int = 96, width: int = 112) -> torch.Tensor:
    """(3, H, W) uint8: smooth and noisy at once, with black, white and every hue."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.integers(-60, 316, (1, 3, 9, 11)).clip(0, 255)).float()
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (smooth + torch.from_numpy(generator.normal(0, 3, (3, height, width)))).clamp(0, 255).to(torch.uint8)


def farthest(ours: np.ndarray, theirs: torch.Tensor) -> float:
    return float(np.abs(ours.astype(np.float64) - theirs.numpy().astype(np.float64)).max())


# ── against torchvision ─────────────────────────────────────────────────────────────────────────────────────────


OPERATIONS = {
    "brightness": (functional.adjust_brightness, (0.0, 0.5, 0.9, 0.97, 1.04, 1.1, 2.0)),
    "contrast": (functional.adjust_contrast, (0.0, 0.5, 0.9, 0.97, 1.04, 1.1, 2.0)),
    "saturation": (functional.adjust_saturation, (0.0, 0.5, 0.9, 0.97, 1.04, 1.1, 2.0)),
    "hue": (functional.adjust_hue, (-0.5, -0.2, -0.05, -0.01, 0.003, 0.03, 0.05, 0.16, 0.17, 0.5)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name):
    operation, values = OPERATIONS[name]
    for value in values:
        for seed in range(3):
            image = photograph(seed)
            ours = recoloured(image.numpy(), NOTHING._replace(**{name: value}))
            turns = math.ceil(abs(value) * 6) - 1 if name == "hue" else 0  # of a sixth of the circle each, but one
            assert farthest(ours, operation(image, value)) <= 2 + turns, (value, seed)


def test_together_they_are_nearer_to_exact_than_torchvisions_of_whole_numbers():
    for k in range(8):
        image, change = photograph(k), draw_change(AugmentationConfig(), WHOLE, 0, k, FRONT)
        ours = recoloured(image.numpy(), change)
        exact, whole = image.double() / 255, image
        for name, (operation, _) in OPERATIONS.items():
            exact, whole = operation(exact, getattr(change, name)), operation(whole, getattr(change, name))
        error, theirs = (np.abs(found - exact.numpy() * 255) for found in (ours, whole.numpy()))
        assert error.max() < 4 and error.mean() < 0.6 and error.mean() < theirs.mean()


@pytest.mark.parametrize("box", [Box(3, 5, 80, 96), Box(0, 0, 95, 112), Box(6, 12, 90, 100), Box(95, 111, 1, 1)])
def test_a_crop_is_torchvisions(box):
    image = photograph(1)
    theirs = functional.resized_crop(image, box.top, box.left, box.height, box.width, [96, 112], antialias=False)
    assert (crop(image, box).int() - theirs.int()).abs().max() <= 1
    assert crop(image, WHOLE) is image


def test_crops_are_distributed_as_torchvisions():
    config, square = AugmentationConfig(), Box(0, 0, 96, 96)
    boxes = np.asarray([draw_change(config, square, 3, k, FRONT).crop for k in range(4000)])
    torch.manual_seed(0)
    image = torch.empty(3, 96, 96)
    transform = RandomResizedCrop(96, scale=config.crop_scale, ratio=config.crop_ratio)
    draws = [transform.make_params([image]) for _ in range(4000)]
    theirs = np.asarray([[draw[name] for name in ("top", "left", "height", "width")] for draw in draws])
    np.testing.assert_allclose(boxes.mean(0), theirs.mean(0), atol=0.35)
    np.testing.assert_allclose(boxes.std(0), theirs.std(0), atol=0.35)
    top, left, height, width = boxes.T
    assert top.min() == left.min() == 0 and (top + height).max() == (left + width).max() == 96
    area, ratio = height * width / 96**2, width / height
    assert 0.79 < area.min() < 0.81 and area.max() > 0.97 and 0.89 < ratio.min() < 0.92 and 1.08 < ratio.max() < 1.12


# ── draws ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_draws_are_a_function_of_seed_number_and_camera():
    config = AugmentationConfig()
    first = draw_change(config, WHOLE, 1, 7, FRONT)
    assert first == draw_change(config, WHOLE, 1, 7, FRONT)
    for others in ((2, 7, FRONT), (1, 8, FRONT), (1, 7, WRIST)):
        other = draw_change(config, WHOLE, *others)
        assert len({first.brightness, other.brightness, first.hue, other.hue}) == 4
    far = draw_change(config, WHOLE, 1, 10**12, FRONT)
    assert far == draw_change(config, WHOLE, 1, 10**12, FRONT)
    colours = np.asarray([draw_change(config, WHOLE, 1, k, FRONT)[1:] for k in range(2000)])
    low, high = np.asarray([0.9, 0.9, 0.9, -0.05]), np.asarray([1.1, 1.1, 1.1, 0.05])
    assert (colours >= low).all() and (colours <= high).all()
    np.testing.assert_allclose(colours.mean(0), (low + high) / 2, atol=0.01)
    np.testing.assert_allclose(np.corrcoef(colours.T), np.eye(4), atol=0.1)


def test_what_is_off_leaves_the_picture():
    off = AugmentationConfig((1, 1), (1, 1), 0, (1, 1), (1, 1), 0)
    image = photograph(0)
    for k in range(5):
        assert augmented(image, WHOLE, draw_change(off, WHOLE, 0, k, FRONT)).equal(image)
    # A crop that can never fit keeps the whole picture.
    wide = replace(off, crop_ratio=(1.5, 2.0))
    assert draw_change(wide, WHOLE, 0, 0, FRONT).crop == WHOLE


def test_the_number_of_threads_changes_nothing():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            image = photograph(2, 224, 224)
            whole = Box(0, 0, 224, 224)
            changes = [draw_change(AugmentationConfig(), whole, 0, k, FRONT) for k in range(4)]
            found.append([augmented(image, whole, change).numpy().tobytes() for change in changes])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_padding_stays_black():
    image = resize_with_pad(photograph(0, 60, 80), 48, 48)
    picture = picture_box((60, 80), (48, 48))
    assert picture == Box(6, 0, 36, 48)
    for k in range(6):
        change = draw_change(AugmentationConfig(brightness=0.5, contrast=(0.1, 0.5)), picture, 0, k, FRONT)
        changed = augmented(image, picture, change)
        assert not changed[:, :6].any() and not changed[:, 42:].any()
        # What is inside is changed as if there was no padding.
        inside = augmented(image[:, 6:42], Box(0, 0, 36, 48), change)
        assert changed[:, 6:42].equal(inside) and not inside.equal(image[:, 6:42])
    assert picture_box((48, 48), (48, 48)) == Box(0, 0, 48, 48)


# ── the config ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_cameras_may_differ():
    config = AugmentationConfig(hue=0.02, cameras={WRIST: None, FRONT: CameraAugmentation(brightness=0.3)})
    assert config.of_camera(WRIST) is None
    front = config.of_camera(FRONT)
    assert (front.brightness, front.hue, front.contrast, front.cameras) == (0.3, 0.02, (0.9, 1.1), None)
    assert config.of_camera("observation.images.other").brightness == 0.1


def config_with(place: Workplace, entry: str):
    return load_config(place.folder / "tiny.yaml", ["--data.train.datasets.0.augmentation", entry], 1)[0]


def test_the_configs_forms(place):
    def of(entry: str) -> AugmentationConfig | None:
        return config_with(place, entry).data.train.datasets[0].augmentation

    assert of("null") is None
    assert of("{}") == AugmentationConfig()
    entry = of(f"{{crop_scale: [0.9, 1], cameras: {{{FRONT}: {{hue: 0}}, {WRIST}: null}}}}")
    assert entry == AugmentationConfig((0.9, 1.0), cameras={FRONT: CameraAugmentation(hue=0.0), WRIST: None})


def test_the_shipped_configs_say_it(monkeypatch):
    monkeypatch.setenv("VLA_DATA_DIR", "/data")
    found = {}
    for path in sorted((REPOSITORY / "config" / "data").glob("*.yaml")):
        arguments = ["--data.train.datasets", f"!include {path}"]
        config = load_config(REPOSITORY / "config/train/pi0_demo.yaml", arguments, 1)[0]
        found[path.stem] = [dataset.augmentation for dataset in config.data.train.datasets]
    assert found["bridge"] == found["fractal"] == [AugmentationConfig()] and found["demo"] == [None]


BAD = {
    "{crop_scale: [0, 1]}": r"augmentation.crop_scale must be two shares 0 < least ≤ most ≤ 1.*got \[0.0, 1.0\]",
    "{crop_scale: [0.8, 1.2]}": "augmentation.crop_scale must be two shares",
    "{crop_ratio: [1.1, 0.9]}": "augmentation.crop_ratio must be two ratios",
    "{brightness: 1.5}": "augmentation.brightness must be 0 to 1, such as 0.1",
    "{brightness: [0.9, 1.1]}": "augmentation.brightness: expected a number",
    "{contrast: 0.1}": r"augmentation.contrast: expected a list of 2 values, got 0.1",
    "{contrast: [0.9]}": "augmentation.contrast: expected 2 values, got 1",
    "{saturation: [1.1, 0.9]}": "augmentation.saturation must be two factors 0 ≤ least ≤ largest ≤ 2",
    "{hue: 18}": "augmentation.hue must be 0 to 0.5, a share of the colour circle",
    "{hew: 0.1}": "augmentation.hew: unknown key; did you mean",
    f"{{cameras: {{{FRONT}: {{hue: 1}}}}}}": f"augmentation.cameras.{FRONT}.hue must be 0 to 0.5",
    f"{{cameras: {{{FRONT}: {{hew: 1}}}}}}": "hew: unknown key; did you mean",
    "true": "expected a mapping with the keys crop_scale, crop_ratio, brightness",
}


@pytest.mark.parametrize("entry", BAD)
def test_mistakes_in_the_config(place, entry):
    with pytest.raises(ConfigError, match=BAD[entry]):
        config_with(place, entry)


# ── samples ─────────────────────────────────────────────────────────────────────────────────────────────────────


def data_with(video, pictures, augmentation):
    """The first data set augmented as given; of the second one's cameras the front one, with its defaults."""
    spec = replace(SPEC, camera_slots=(FRONT, WRIST))
    first = dataset_config(video, weight=1.0, cameras={FRONT: FRONT, WRIST: None}, augmentation=augmentation)
    own = AugmentationConfig(cameras={WRIST: None}) if augmentation else None
    return built(first, dataset_config(pictures, weight=1.0, augmentation=own), tokenizer=TOKENIZER, spec=spec)


def test_samples_do_not_depend_on_the_split(video, pictures):
    data, plain = (data_with(video, pictures, entry) for entry in (AugmentationConfig(), None))
    assert sum("are augmented" in line for line in data.report) == 2
    whole, without = by_number(micro_batches(data, 3, batch=16)), by_number(micro_batches(plain, 3, batch=16))
    assert sorted(whole) == list(range(48)) and {sample[0][0] for sample in whole.values()} == {0, 1}
    for k, sample in whole.items():
        assert sample[1] != without[k][1]
        assert sample[:1] + sample[2:] == without[k][:1] + without[k][2:]  # only the pictures differ
    assert by_number(micro_batches(data, 12, batch=4)) == whole  # accumulation over four
    for workers in (2, 4):
        assert by_number(micro_batches(data, 12, batch=4, workers=workers)) == whole
    ranks = [micro_batches(data, 6, batch=4, rank=rank, world=2) for rank in (0, 1)]
    assert by_number(ranks[0] + ranks[1]) == whole
    resumed = by_number(micro_batches(data, 2, batch=16, first_sample=16))
    assert resumed == {k: sample for k, sample in whole.items() if k >= 16}


def test_cameras_and_validation_that_are_left_alone(video, pictures):
    data, plain = (data_with(video, pictures, entry) for entry in (AugmentationConfig(), None))
    (batch,), (other,) = (micro_batches(each, 1, batch=16) for each in (data, plain))
    assert batch.observation.images[WRIST].equal(other.observation.images[WRIST])
    assert not batch.observation.images[FRONT].equal(other.observation.images[FRONT])
    ours, theirs = (list(ValidationBatches(each.validation, 12, 4)) for each in (data, plain))
    assert [by_number([item.batch]) for item in ours] == [by_number([item.batch]) for item in theirs]


def test_bars_of_a_store_are_known_from_the_metadata(video, tmp_path):
    root = tmp_path / "stored"
    shutil.copytree(video, root)
    source = open_source(dataset_config(root), 4, "pyav", 1e-4)
    source.cameras = {FRONT: FRONT}
    prepare(source, WantedStore("raw", 95, (48, 48)), skip_bad_episodes=False, workers=1)
    config = dataset_config(root, augmentation=AugmentationConfig())
    found = [
        by_number(micro_batches(built(config, tokenizer=TOKENIZER, frame_store=kind), 1, batch=16))
        for kind in ("raw", "none")
    ]
    assert found[0] == found[1]
    for sample in found[0].values():
        image = np.frombuffer(sample[1], np.uint8).reshape(3, 48, 48)
        assert not image[:, :5].any() and not image[:, -5:].any() and image[:, 5:-5].all(axis=(1, 2)).any()


def test_a_camera_that_the_model_does_not_have(video):
    config = dataset_config(video, augmentation=AugmentationConfig(cameras={WRIST: None}))
    with pytest.raises(
        ValueError, match=rf"data set test/data: `augmentation.cameras` names {WRIST}, .*write one of {FRONT}"
    ):
        built(config, tokenizer=TOKENIZER)


# ── runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_is_killed_and_one_of_another_split(place: Workplace, server: ForkServer):
    augmentation = ("--data.train.datasets.0.augmentation", "{}", "--n_updates", "12", "--eval_freq", "1000")

    def losses(name: str) -> list[float]:
        return [line["loss"] for line in place.metrics(name)]

    runs = [server.start(place, "alone", *augmentation), server.start(place, "two", *augmentation, ranks=2)]
    runs += [server.start(place, "plain", *augmentation[2:]), server.start(place, "killed", *augmentation)]
    runs[3].wait_for_step(5)
    runs[3].kill_all()
    outputs = [run.wait() for run in runs[:3]]
    assert len(losses("alone")) == 12, outputs[0]
    assert losses("two") == pytest.approx(losses("alone"), rel=1e-5)
    assert len(losses("plain")) == 12 and losses("plain")[0] != losses("alone")[0]
    before = len(losses("killed"))
    output = server.start(place, "killed", *augmentation).wait()
    assert before < 12 and "own checkpoint" in output and losses("killed") == losses("alone"), output
    # Other values are another run.
    entry = "{hue: 0.1}"
    output = server.start(place, "killed", "--data.train.datasets.0.augmentation", entry, *augmentation[2:]).wait()
    assert "data.train.datasets.0.augmentation.hue: 0.05 → 0.1" in output and "resume_changes" in output, output
    output = server.start(place, "killed", *augmentation[2:]).wait()
    assert "data.train.datasets.0.augmentation: {" in output and "→ None" in output, output
    longer = ("--n_updates", "14", "--resume_changes", "true")
    output = server.start(place, "killed", "--data.train.datasets.0.augmentation", entry, *longer).wait()
    assert len(losses("killed")) == 14, output
