"""Fills the tables of docs/benchmarks.md that are about a GPU from the results of an acceptance, and from nothing else.

A table stands between ``<!-- gpu: NAME -->`` and ``<!-- end -->``. Its rows and columns are the page's own; a row is known by
the cells of its first columns. Cells that were not measured are left empty, whatever they held before.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 1 << 30
Line = dict[str, Any]
Cells = dict[tuple[str, ...], dict[str, str]]
"""The first cells of a row → column → cell."""


def report(results: Path, page: Path) -> int:
    """Rewrites the page; the exit code.

    Results of a rehearsal are refused, and so are those that do not say where they are from.
    """
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    machine = next((line for line in lines if line["check"] == "machine"), None)
    if machine is None or machine["device"] != "cuda":
        print(f"{results} is {'not of a GPU' if machine else 'without the line of step 0 that names the machine'}; nothing is "
              f"written into {page}", file=sys.stderr)  # fmt: skip
        return 1
    text = page.read_text()
    # Of a check that was made twice the last result counts.
    found = {(line["step"].split()[1], _check(line)): line for line in lines}
    for name, make in TABLES.items():
        text = _filled(text, name, make(found), page)
    text = _between(text, "machine", [_machine(machine)], page)
    page.write_text(text)
    return 0


def _check(line: Line) -> str:
    """Some steps are several processes, and each of them ends."""
    return f"end of {line['step']}" if line["check"] == "end" else line["check"]


def _filled(text: str, name: str, cells: Cells, page: Path) -> str:
    keys, measured = COLUMNS[name]
    head, rule, *rows = _inside(text, name, page)
    header = [cell.strip() for cell in head.strip("|").split("|")]
    filled = []
    for line in rows:
        row = [cell.strip() for cell in line.strip("|").split("|")]
        values = cells.get(tuple(row[:keys]), {})
        # A target or a prediction is the page's own.
        row = [values.get(h, "") if h in measured else cell for h, cell in zip(header, row, strict=True)]
        filled.append("|" + "".join(f" {cell} |" if cell else " |" for cell in row))
    return _between(text, name, [head, rule, *filled], page)


def _inside(text: str, name: str, page: Path) -> list[str]:
    match = re.search(_pattern(name), text, flags=re.S)
    if match is None:
        raise ValueError(f"{page} has no `<!-- gpu: {name} -->` … `<!-- end -->` around a table")
    return match[2].strip().splitlines()


def _between(text: str, name: str, lines: list[str], page: Path) -> str:
    _inside(text, name, page)
    return re.sub(
        _pattern(name), lambda match: f"{match[1]}\n\n" + "\n".join(lines) + f"\n\n{match[3]}", text, flags=re.S
    )


def _pattern(name: str) -> str:
    return rf"(<!-- gpu: {name} -->)\n(.*?)\n(<!-- end -->)"


def _machine(line: Line) -> str:
    packages = ", ".join(
        f"{name} {line[name]}" for name in ("torch", "triton", "transformers", "numpy") if line.get(name)
    )
    return (
        f"Measured on {line['date']}: {line['name']}, {line['memory_bytes'] / GIB:.1f} GiB; {packages}, "
        f"CUDA {line['cuda']}, cuDNN {line['cudnn']}."
    )


def _speed(found: dict[tuple[str, str], Line]) -> Cells:
    rows = {check: line for (step, check), line in found.items() if step == "speed" and "samples_per_s" in line}
    peer = rows.get("LeRobot, eager, 3 of 3", {}).get("samples_per_s")
    return {
        (check,): {
            "samples/s": f"{line['samples_per_s']:.1f}",
            "ratio": f"{line['samples_per_s'] / peer:.2f}"
            if peer and line["batch"] == 32 and "LeRobot" not in check
            else "",
            "fraction": f"{line['fraction']:.2f}",
            "peak GiB": f"{line['peak_bytes'] / GIB:.1f}",
            "recomputed": "yes" if "checkpointed" in line["contender"] else "no",
        }
        for check, line in rows.items()
    }


def _memory(found: dict[tuple[str, str], Line]) -> Cells:
    return {
        tuple(str(line[key]) for key in ("batch", "cameras", "recomputed", "optimizer", "precision")): {
            "measured on a GPU": f"{line['measured_bytes'] / GIB:.1f}"
        }
        for (step, _), line in found.items()
        if step == "peaks" and line.get("measured_bytes")
    }


def _attention(found: dict[tuple[str, str], Line]) -> Cells:
    cells: Cells = {}
    for (step, check), line in found.items():
        shape, _, mask = check.rpartition(", mask ")
        if step != "attention" or mask not in ("none", "padded"):
            continue
        cells[(shape, mask)] = {
            "chosen": line["chosen"] or "",
            "largest error": f"{max(line['errors']):.1e}" if line["errors"] else "",
            "its ms": f"{1e3 * line['chosen_s']:.2f}" if line["chosen_s"] else "",
            "fastest": line["fastest"] or "none is right",
            "ms": f"{1e3 * line['fastest_s']:.2f}" if line["fastest_s"] else "",
        }
    return cells


def _other(found: dict[tuple[str, str], Line]) -> Cells:
    """What is one number each."""
    wanted: dict[str, tuple[str, str, Callable[[Line], str]]] = {
        "bytes copied": ("ceilings", "copy", lambda x: f"{x['bytes_per_s'] / 1e12:.2f} TB/s"),
        "bfloat16 products": ("ceilings", "product", lambda x: f"{x['flops'] / 1e12:.0f} TFLOP/s"),
        "a snapshot's memory, pinned": ("snapshot", "pin", lambda x: f"{x['bytes'] / 1e9:.1f} GB in {x['seconds']:.1f} s"),
        "stall of a save": ("snapshot", "stall", lambda x: f"{100 * x['share']:.1f}% of ten updates"),
        "weights written": ("snapshot", "write", lambda x: f"{x['bytes'] / 1e9:.1f} GB in {x['seconds']:.1f} s"),
        "the same loaded": ("snapshot", "load", lambda x: f"{x['seconds']:.1f} s"),
        "update of the low-memory optimizer": ("acting", "update of the low-memory optimizer",
                                               lambda x: f"{x['seconds']:.3f} s"),
        "actions of one observation": ("acting", "latency, 1 observations", lambda x: f"{x['p50_ms']:.0f} ms"),
        "actions of eight": ("acting", "latency, 8 observations", lambda x: f"{x['p50_ms']:.0f} ms"),
        "largest difference without `deterministic`": ("demo", "free_again and free", lambda x: f"{x['largest']:.1e}"),
    }  # fmt: skip
    return {(row,): {"measured": make(found[step, check])} for row, (step, check, make) in wanted.items()
            if (step, check) in found}  # fmt: skip


def _steps(found: dict[tuple[str, str], Line]) -> Cells:
    """Whether everything of a step is as it should be."""
    cells: Cells = {}
    for step in dict.fromkeys(step for step, _ in found):
        own = {check: line for (of, check), line in found.items() if of == step}
        ends = [line for line in own.values() if line["check"] == "end"]
        wrong = [check for check, line in own.items() if line["passed"] is False]
        told = [*wrong, *([] if ends else ["did not end"])]
        cells[(step,)] = {"checks": str(len(own) - len(ends)), "failed": "; ".join(told) or "none"}
    return cells


TABLES: dict[str, Callable[[dict[tuple[str, str], Line]], Cells]] = {
    "steps": _steps, "speed": _speed, "memory": _memory, "attention": _attention, "other": _other,
}  # fmt: skip
COLUMNS: dict[str, tuple[int, set[str]]] = {
    "steps": (1, {"checks", "failed"}),
    "speed": (1, {"samples/s", "ratio", "fraction", "peak GiB", "recomputed"}),
    "memory": (5, {"measured on a GPU"}),
    "attention": (2, {"chosen", "largest error", "its ms", "fastest", "ms"}),
    "other": (1, {"measured"}),
}
"""Table → how many of the first columns name a row, and which columns are measured."""
