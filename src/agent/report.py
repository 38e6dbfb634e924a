"""Writes a run's report, or compares runs: ``uv run python -m agent.report RUN_A [RUN_B …] [--out FILE]``.

    uv run python -m agent.report runs/pi0_demo                       # writes runs/pi0_demo/report.html
    uv run python -m agent.report runs/a runs/b --out comparison.html

The page is one file that opens offline. A run folder can be of a run that is still going on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agent.reporting.collect import collect
from agent.reporting.writing import write_page


def main(arguments: list[str]) -> int:
    """Exit code 2 for what the user has to put right."""
    parser = argparse.ArgumentParser(prog="python -m agent.report", description=str(__doc__).split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, like runs/pi0_demo")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: RUN/report.html for one run, comparison.html here for several",
    )
    options = parser.parse_args(arguments)
    try:
        places = [path.resolve() for path in options.runs]
        for place, path in zip(places, options.runs, strict=True):
            if places.count(place) > 1:
                raise ValueError(f"{path} is given twice; name each run once")
        runs = [collect(path) for path in options.runs]
        out = options.out or (options.runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
        write_page(runs, out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written or a run not be read: {error}; give another --out", file=sys.stderr)
        return 2
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, opens in any browser")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
