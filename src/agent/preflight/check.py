"""Runs ``--check true``: shows within a minute or two what would stop a job that waits for hours; see docs/preflight.md.

Each check is a function that takes what all share and returns rows of a table. A check that fails stops no other.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from agent import hub
from agent.lifecycle.run_folder import report_attempt
from agent.preflight import (
    cameras,
    combinations,
    disk,
    environment,
    integrity,
    loading,
    memory,
    normalised,
    pace,
    rehearsal,
    schedule,
    start,
)
from agent.preflight.context import Context
from agent.preflight.pace import MFU
from agent.preflight.report import NotChecked, Row, failed, table, unchecked, worst, write

if TYPE_CHECKING:
    from agent.configuration_pipeline import TrainPipelineConfig
    from agent.parallel.launch import Launch

log = logging.getLogger(__name__)

Check = Callable[[Context], list[Row]]

# Name for rows that a check could not write itself → the check, in the order of the table. A later one may use what an
# earlier one has measured.
CHECKS: dict[str, Check] = {
    "config": combinations.check,
    "environment": environment.check,
    "data": integrity.check,
    "data: together": integrity.check_together,
    "cameras": cameras.check,
    "statistics": normalised.check,
    "start": start.check,
    "schedule": schedule.check,
    "memory": memory.check,
    "disk": disk.check,
    "update": rehearsal.check,
    "loader": loading.check,
    "time": pace.check,
}


def check(config: TrainPipelineConfig, launch: Launch) -> int:
    """Runs every check, prints the table and writes ``check/`` in the run folder.

    Returns:
        The exit code: 0, or 2 if a check failed.
    """
    if launch.rank != 0:  # of torchrun; one process is enough, and no group is formed
        return 0
    if not config.debug:
        logging.getLogger("agent").setLevel(logging.ERROR)  # the table says it
    # A SLURM script asks whether to requeue. A check never is; this stands if it is killed before it says how it ended.
    report_attempt("failed", reason="the check was ended", error_kind="config", run_dir=str(config.run_dir))
    context = Context(config, launch)
    rows: list[Row] = []
    with hub.offline():  # a check downloads nothing
        for name, function in CHECKS.items():
            print(f"checking: {name} …", file=sys.stderr, flush=True)
            rows += _rows(name, function, context)
    seconds = time.time() - context.started
    facts = {
        "config": config.name,
        "gpus": context.gpus[0],
        "gpu": [gpu.name for gpu in context.kinds[0]],
        "assumed_mfu": MFU,
        "seconds": round(seconds, 1),
    }
    print(table(rows))
    try:
        write(context.folder / "report.json", rows, facts)
    except (OSError, NotChecked) as error:  # a row says so already
        print(f"\nreport.json could not be written: {error}", file=sys.stderr)
    counts = {result: sum(row.result == result for row in rows) for result in ("pass", "warn", "fail")}
    told = ", ".join(f"{number} {result}" for result, number in counts.items())
    print(f"\n{told}, in {seconds:.0f} s; more in {config.run_dir / 'check'}", flush=True)
    fine = worst(rows) != "fail"
    names = ", ".join(dict.fromkeys(row.name for row in rows if row.result == "fail"))
    report_attempt(
        "finished" if fine else "failed",
        reason="" if fine else f"the check fails: {names}",
        error_kind=None if fine else "config",
        step=start.own_step(context) or 0,
        run_dir=str(config.run_dir),
    )
    return 0 if fine else 2


def _rows(name: str, function: Check, context: Context) -> list[Row]:
    try:
        return function(context)
    except NotChecked as error:
        return [unchecked(name, error)]
    except ValueError as error:
        return [failed(name, error)]
    except Exception as error:  # the others are still worth having; this one fails
        log.exception("the check of %s could not be made", name)
        what = f"the check could not be made: {type(error).__name__}: {error}"
        return [Row(name, "fail", what, "see the traceback above; what stopped the check may stop the training")]
