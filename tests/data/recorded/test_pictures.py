"""Pictures that are no colours of 8 bits are refused by name, others are converted alike.

Run: pytest tests/data/recorded/test_pictures.py
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.datasets import write_dataset
from support.samples import prompt_of

from agent.batch import SampleSpec
from agent.data.build import build_data
from agent.data.configuration import DataConfig, DatasetConfig, TrainDataConfig, ValDataConfig
from agent.data.frames.making import prepare
from agent.data.frames.store import WantedStore
from agent.data.normalization.robot_statistics import Normalization
from agent.data.recorded.pictures import NoColours, check_format, stored_picture
from agent.data.samples.wording import Wording
from agent.data.source import Source, open_source

FRONT = "observation.images.front"
SIZE = (32, 48)
RAMP = np.linspace(400, 1500, SIZE[0] * SIZE[1]).reshape(SIZE)


def file_of(values: Any, kind: str, **settings) -> bytes:
    """A picture file of any values, also 16 bits of red, green and blue, which Pillow cannot write."""
    import cv2
    from PIL import Image

    if isinstance(values, np.ndarray) and values.dtype == np.uint16 and values.ndim == 3:
        return cv2.imencode(f".{kind}", values)[1].tobytes()
    image = Image.fromarray(values) if isinstance(values, np.ndarray) else values
    image.save(file := io.BytesIO(), kind, **settings)
    return file.getvalue()


DEEP = {
    "16 bits a channel (PNG, mode I;16)": file_of(RAMP.astype(np.uint16), "png"),
    "16 bits a channel (PNG, mode RGB)": file_of(np.repeat(RAMP[:, :, None], 3, axis=2).astype(np.uint16), "png"),
    "32 bits a channel (TIFF, mode I)": file_of(RAMP.astype(np.int32), "tiff"),
    "floating-point values (TIFF, mode F)": file_of(RAMP.astype(np.float32), "tiff"),
}


def with_pictures(root: Path, files: list[bytes]) -> Path:
    """A data set of two episodes of 4 frames whose pictures are replaced; fewer files are repeated."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_dataset(root, episodes=2, length=4, cameras={FRONT: SIZE}, video=False)
    (path,) = root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    at = table.schema.get_field_index(FRONT)
    pictures = [{"bytes": files[row % len(files)], "path": f"{row}.png"} for row in range(len(table))]
    pq.write_table(
        table.set_column(at, table.schema.field(FRONT), pa.array(pictures, table.schema.field(FRONT).type)), path
    )
    return root


def source_of(root: Path) -> Source:
    source = open_source(DatasetConfig("test/data", root=str(root)), 4, "pyav", 1e-4)
    source.cameras = {FRONT: FRONT}
    return source


@pytest.mark.parametrize("what", DEEP)
def test_pictures_that_are_no_colours_are_refused_before_anything_is_read(tmp_path, what):
    root = with_pictures(tmp_path / "data", [DEEP[what]])
    said = rf"data set test/data: a picture of {FRONT}, for the camera {FRONT}, has {re.escape(what)} in {root}/data/"
    source = source_of(root)
    with pytest.raises(RuntimeError, match=rf"the picture of {FRONT} has {re.escape(what)}"):
        source.read(0)
    with pytest.raises(ValueError, match=said):
        prepare(source, WantedStore("raw", 95, SIZE), skip_bad_episodes=True, workers=1)
    spec = SampleSpec(4, 16, 10, SIZE, 16)
    config = DataConfig(
        TrainDataConfig([DatasetConfig("test/data", root=str(root))], num_workers=0), ValDataConfig(fraction=0)
    )
    with pytest.raises(ValueError, match=rf"{said}.*`cameras: \{{{FRONT}: null\}}`"):
        build_data(
            config,
            spec,
            seed=0,
            draw=None,
            validation_draw=None,
            normalization=Normalization({}),
            wording=Wording(prompt_of("nowhere")),
        )


def test_a_deep_picture_among_others_costs_its_episode(tmp_path):
    """The first and the last file are looked at from the start; a store is made of every picture."""
    fine = file_of(np.full((*SIZE, 3), 9, np.uint8), "png")
    root = with_pictures(tmp_path / "data", [fine] * 5 + [next(iter(DEEP.values()))] + [fine] * 2)
    source = source_of(root)
    assert source.read(4).images[FRONT].unique().tolist() == [9]
    with pytest.raises(ValueError, match=r"episodes 1 cannot be read.*the picture of frame 1 .*has 16 bits a channel"):
        prepare(source, WantedStore("raw", 95, SIZE), skip_bad_episodes=False, workers=1)


def test_other_forms_of_the_same_colours_are_converted_alike_for_reader_and_store(tmp_path):
    from PIL import Image

    colours = np.random.default_rng(0).integers(0, 6, (*SIZE, 3)).astype(np.uint8) * 51
    picture = Image.fromarray(colours)
    grey = picture.convert("L")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    palette = picture.quantize(216)
    forms = {
        "palette": (file_of(palette, "png"), np.asarray(palette.convert("RGB"))),
        "transparent palette": (file_of(palette, "png", transparency=3), np.asarray(palette.convert("RGB"))),
        "transparent": (file_of(np.dstack([colours, colours[:, :, :1]]), "png"), colours),
        "transparent grey": (file_of(grey.convert("LA"), "png"), np.repeat(np.asarray(grey)[:, :, None], 3, 2)),
        "black and white": (
            file_of(grey.point(lambda value: 255 * (value > 99), "1"), "png"),
            np.repeat(255 * (np.asarray(grey) > 99)[:, :, None], 3, 2),
        ),
        "turned": (file_of(picture, "png", exif=turned), colours[::-1, ::-1]),
    }
    assert len({tuple(expected.shape) for _, expected in forms.values()}) == 1
    source = source_of(with_pictures(tmp_path / "data", [file for file, _ in forms.values()]))
    prepare(source, WantedStore("raw", 95, SIZE), skip_bad_episodes=False, workers=1)
    stored = open_source(source.config, 4, "pyav", 1e-4, wanted=WantedStore("raw", 95, SIZE))
    stored.cameras = source.cameras
    for position, (name, (_, expected)) in enumerate(forms.items()):
        for reader in (source, stored):
            found = reader.read(position).images[FRONT].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(found, expected, err_msg=f"{name}, {reader.store}")


def test_channels_that_are_no_colours_are_named():
    from PIL import Image

    file = file_of(Image.new("CMYK", (8, 8)), "jpeg")
    with pytest.raises(NoColours, match=r"other channels than red, green and blue \(JPEG, mode CMYK\)"):
        stored_picture({"bytes": file, "path": None})


def test_depths_in_a_video_are_refused_and_colours_of_ten_bits_are_not(tmp_path):
    import av

    root = write_dataset(tmp_path / "data", episodes=1, length=4, cameras={FRONT: SIZE})
    (path,) = root.glob("videos/*/*/*.mp4")
    for pixel_format, codec, fine in (("gray16be", "png", False), ("yuv420p10le", "libx264", True)):
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, 10, options={"crf": "4"} if fine else {})
            stream.height, stream.width, stream.pix_fmt = *SIZE, pixel_format
            for _ in range(4):
                frame = av.VideoFrame.from_ndarray(np.full((*SIZE, 3), 100, np.uint8), format="rgb24")
                container.mux(stream.encode(frame.reformat(format=pixel_format)))
            container.mux(stream.encode(None))
        source = source_of(root)
        if fine:
            assert abs(source.read(2).images[FRONT].float().mean() - 100) < 3
            prepare(source, WantedStore("raw", 95, SIZE), skip_bad_episodes=False, workers=1)
            continue
        with pytest.raises(RuntimeError, match=r"has 16 bits a channel \(pixel format gray16be\)"):
            source.read(2)
        with pytest.raises(
            ValueError, match=rf"a frame of {FRONT}, .*has 16 bits a channel \(pixel format gray16be\) in {path}"
        ):
            prepare(source, WantedStore("raw", 95, SIZE), skip_bad_episodes=False, workers=1)


def test_formats_of_videos():
    for name in ("yuv420p", "yuv444p10le", "nv12", "gray", "rgb24", "gbrp12le", "pal8", "none of this FFmpeg"):
        check_format(name)
    for name in ("gray16le", "gray10le", "ya16le", "grayf32le", "gbrpf32le"):
        with pytest.raises(NoColours, match="bits a channel"):
            check_format(name)


def test_the_check_before_a_job_names_them_too(tmp_path):
    from types import SimpleNamespace

    from agent.data.configuration import DataConfig
    from agent.preflight.survey import survey

    root = with_pictures(tmp_path / "data", [next(iter(DEEP.values()))])
    dataset = DatasetConfig("test/data", root=str(root))
    policy = SimpleNamespace(sample_spec=lambda model: SampleSpec(4, 16, 10, SIZE, 16))
    data = DataConfig(TrainDataConfig([dataset]), ValDataConfig(fraction=0))
    config = SimpleNamespace(data=data, family=policy, trainable=None)
    found = survey("data.train.datasets.0", dataset, config)
    assert found.problem is None
    assert f"a picture of {FRONT}, for the camera {FRONT}, has 16 bits a channel" in str(found.mismatch)
    assert json.loads((root / "meta" / "info.json").read_text())["total_episodes"] == 2
