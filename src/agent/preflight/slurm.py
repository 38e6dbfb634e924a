"""Finds out what the job will get: from SLURM's variables within a job, else from the script with the run's name."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from agent.preflight.refusal import Refusal

SCRIPTS = Path("slurms") / "train_scripts"


@dataclass
class Job:
    """What is known of a job; None stands for what is not known."""

    source: str
    """Where this was read, in words for the user."""
    limit_s: float | None = None
    """Seconds that it may run, or that are left."""
    warning_s: float = 0.0
    """Seconds before the limit at which the run is told to save."""
    gpus: int | None = None
    gpu_words: list[str] = field(default_factory=list)
    """The cluster's words for the GPUs that it asks for."""
    cores: int | None = None
    requeue: bool = False


def find_job(name: str, folders: list[Path], now: float) -> Job | None:
    """Finds the job of a run.

    Args:
        name: of the run, and of its script; within a job the job's name counts first.
        folders: where ``slurms/train_scripts`` may be.
        now: seconds since 1970.

    Returns:
        None outside a job if there is no such script.
    """
    within = "SLURM_JOB_ID" in os.environ
    # A job's own name says which script it is of; the run can have been given another by --name.
    names = [os.environ.get("SLURM_JOB_NAME", name), name] if within else [name]
    places = [folder / SCRIPTS / f"{one}.sh" for one in names for folder in folders]
    script = next((path for path in places if path.is_file()), None)
    job = _of_script(script) if script is not None else None
    if not within:
        return job
    job = job or Job("")
    job.source = f"job {os.environ['SLURM_JOB_ID']}"
    if (end := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():
        job.limit_s = max(float(end) - now, 0.0)
    for variable, key in (("SLURM_GPUS_ON_NODE", "gpus"), ("SLURM_CPUS_ON_NODE", "cores")):
        if os.environ.get(variable, "").isdigit():
            setattr(job, key, int(os.environ[variable]))
    return job


def _of_script(path: Path) -> Job:
    options = _options(path)
    job = Job(str(SCRIPTS / path.name), requeue="requeue" in options)
    if (limit := options.get("time")) is not None:
        job.limit_s = seconds_of(limit)
    if signal := options.get("signal"):
        _, _, ahead = signal.partition("@")
        job.warning_s = float(ahead) if ahead.isdigit() else _WARNING_S
    tasks = int(options.get("ntasks-per-node", options.get("ntasks", "1")))
    for key in ("gres", "gpus-per-node", "gpus", "gpus-per-task"):
        for resource in options.get(key, "").split(","):  # gres can be a list, of a disk beside the GPUs for instance
            match = _GPUS.fullmatch(resource.strip())
            if match and (match["gres"] if key == "gres" else match["count"]):
                job.gpus = int(match["count"] or 1) * (tasks if key == "gpus-per-task" else 1)
                job.gpu_words += [match["kind"]] if match["kind"] else []
    job.gpu_words += [word for word in re.split(r"[|&,\[\]()]", options.get("constraint", "")) if word]
    for key, each in (("cpus-per-task", tasks), ("cpus-per-gpu", job.gpus or 0)):
        if options.get(key, "").isdigit() and each:
            job.cores = each * int(options[key])
    return job


_WARNING_S = 60.0  # SLURM's own, where --signal names no time
_GPUS = re.compile(
    r"(?P<gres>(gres[:/])?gpu(?![a-z])[:/]?)?((?P<kind>[a-zA-Z][\w.-]*):?)?(?P<count>\d+)?(\(S:[^)]*\))?"
)
_SHORT = {"t": "time", "C": "constraint", "c": "cpus-per-task", "G": "gpus", "n": "ntasks"}


def _options(path: Path) -> dict[str, str]:
    """Reads the ``#SBATCH`` lines of a script, long name → value; like sbatch, up to the first command."""
    options: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if not re.match(r"#SBATCH\s", line):
            continue
        try:
            words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        except ValueError as error:
            raise Refusal(f"{path}: the line `{line}` cannot be read ({error})", "close its quotation") from error
        for place, word in enumerate(words):
            following = words[place + 1] if place + 1 < len(words) else ""
            if word == "--no-requeue":
                options.pop("requeue", None)
            elif word.startswith("--"):
                key, given, value = word[2:].partition("=")
                options[key] = value if given else "" if following.startswith("-") else following
            elif re.fullmatch(r"-[A-Za-z].*", word) and word[1] in _SHORT:
                options[_SHORT[word[1]]] = word[2:] or following
    return options


def seconds_of(limit: str) -> float | None:
    """Reads SLURM's time, ``minutes``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``; None for 0, which is no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit.strip())
    if match is None:
        return None
    days, first, second, third = (float(part or 0) for part in match.groups())
    if match[1] is not None:
        total = days * 86400 + first * 3600 + second * 60 + third
    elif match[4] is not None:
        total = first * 3600 + second * 60 + third
    else:
        total = first * 60 + second
    return total or None
