"""Which instruction a frame has, however the table of instructions is numbered.

Run: uv run pytest tests/data/samples/test_instructions.py
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from support.datasets import DEFAULT_TASKS
from support.samples import built, dataset_config, opened

from agent.data.configuration import ValDataConfig


def test_empty_instruction(video, tmp_path, tokenizer):
    import pandas as pd

    shutil.copytree(video, tmp_path / "copy")
    path = tmp_path / "copy" / "meta" / "tasks.parquet"
    tasks = pd.read_parquet(path)
    tasks.index = [DEFAULT_TASKS[0], " "]
    tasks.to_parquet(path)
    with pytest.raises(ValueError, match=r"instruction of episode 1, frame 0 is empty"):
        built(dataset_config(tmp_path / "copy"), tokenizer=tokenizer, val=ValDataConfig(fraction=0))


def numbered(root, numbers, tasks=DEFAULT_TASKS, wanted=(0, 1)):
    """Writes the table of tasks with these numbers, row by row; the data files have ``wanted`` for the two instructions."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame = pd.DataFrame({"task_index": numbers}, index=pd.Index(list(tasks), name="task"))
    frame.to_parquet(root / "meta" / "tasks.parquet")
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        number = np.asarray(wanted)[table["episode_index"].to_numpy() % 2]
        at = table.column_names.index("task_index")
        pq.write_table(table.set_column(at, "task_index", pa.array(number)), path)


@pytest.mark.parametrize(
    ("numbers", "tasks", "wanted"),
    [
        ([1, 0], DEFAULT_TASKS[::-1], (0, 1)),  # rows in another order
        ([1, 2], DEFAULT_TASKS, (1, 2)),  # from 1
        ([9, 4, 7], [DEFAULT_TASKS[1], "what no frame has", DEFAULT_TASKS[0]], (7, 9)),  # a subset of a larger one
        ([0.0, 1.0], DEFAULT_TASKS, (0, 1)),
    ],
)
def test_an_instruction_is_that_of_its_number_and_not_of_its_row(video, tmp_path, tokenizer, numbers, tasks, wanted):
    from agent.preflight.survey import Survey, _look_at_numbers

    root = tmp_path / "copy"
    shutil.copytree(video, root)
    numbered(root, numbers, tasks, wanted)
    source = opened(root)
    assert [source.read(position).task for position in (0, 12, 24, 36)] == [*DEFAULT_TASKS, *DEFAULT_TASKS]
    one, other = (
        built(dataset_config(path), tokenizer=tokenizer, val=ValDataConfig(fraction=0)) for path in (root, video)
    )
    assert one.fingerprint == other.fingerprint
    np.testing.assert_array_equal(one.reader.sample(0, 0, 12).tokens, other.reader.sample(0, 0, 12).tokens)
    found = Survey("data", dataset_config(root), chosen=source.chosen)
    _look_at_numbers(found, source.metadata, None)
    assert found.bad == {}


@pytest.mark.parametrize(
    ("numbers", "wanted", "message"),
    [
        ([1, 2], (0, 1), r"episode 0, frame 0 is missing \(task 0 in meta/tasks.parquet\)"),
        (
            [3, 3],
            (3, 3),
            r"test/data: task_index 3 of .*tasks.parquet is both 'push the red button' and 'open the drawer'",
        ),
        (
            [0.5, 1.0],
            (0, 1),
            r"test/data: the column task_index of .*tasks.parquet must hold a whole number in each row",
        ),
        (["0", None], (0, 1), r"needs one column of instructions|must hold a whole number in each row"),
    ],
)
def test_numbers_of_instructions_that_tell_nothing(video, tmp_path, tokenizer, numbers, wanted, message):
    root = tmp_path / "copy"
    shutil.copytree(video, root)
    numbered(root, numbers, wanted=wanted)
    with pytest.raises(ValueError, match=message):
        built(dataset_config(root), tokenizer=tokenizer, val=ValDataConfig(fraction=0))


def test_the_fingerprint_knows_which_frame_has_which_instruction(video, tmp_path, tokenizer):
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fingerprint(root):
        return built(dataset_config(root), tokenizer=tokenizer, val=ValDataConfig(fraction=0)).fingerprint

    root = tmp_path / "copy"
    shutil.copytree(video, root)
    path = root / "meta" / "tasks.parquet"
    tasks = pd.read_parquet(path)
    tasks.index = list(tasks.index[::-1])
    tasks.to_parquet(path)
    assert len(tasks) == 2 and fingerprint(root) != fingerprint(video)
    (rows,) = root.glob("data/*/*.parquet")
    table = pq.read_table(rows)
    at = table.column_names.index("task_index")
    pq.write_table(table.set_column(at, "task_index", pa.array(1 - table["task_index"].to_numpy())), rows)
    assert fingerprint(root) == fingerprint(video)  # other numbers for the same words
