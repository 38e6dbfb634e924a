"""Plants errors in the product, one at a time, and lists those that the nearest tests do not notice.

The mutations are mutmut's, and two more: a call that is left out, a condition that is turned around. Of every module
of ``NEAREST`` a number of them is drawn, evenly over the kinds of mutation. Each is planted in a copy of the tree, and
the module's test files run on it, the cheapest first, until one fails. Texts (strings, log lines, what an error says),
type hints and decorators are not mutated.

uv run --with mutmut==3.8.1 python scripts/mutate.py /tmp/mutants --number 8 --seed 0

Continues where it was ended; with ``--again`` it plants what was not caught once more, after a test was added.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import py_compile
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import libcst as cst
import libcst.matchers as m
import psutil
import pytest
from mutmut.mutation.file_mutation import Mutation, MutationVisitor, OuterFunctionProvider
from mutmut.mutation.mutators import mutation_operators, operator_string
from mutmut.mutation.pragma_handling import IgnoredCode

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHON = REPOSITORY / ".venv" / "bin" / "python"

# Module → the test files (tests/…/test_*.py) that are nearest to it, the cheapest first.
NEAREST = {
    "training.trainer": "reliability training",
    "training.step": "reliability training",
    "training.metrics_line": "reliability training",
    "training.saving": "optim checkpoint_writer reliability training",
    "training.resuming": "reliability training",
    "optim.optimizer": "optim low_memory_optimizers",
    "optim.learning_rate": "optim",
    "optim.low_memory_adamw": "low_memory_optimizers",
    "optim.adamw8bit": "low_memory_optimizers",
    "optim.stochastic_rounding": "low_memory_optimizers",
    "optim.ema": "ema",
    "reproducibility": "mixture build mixed_data",
    "data.samples.mixture": "mixture mixed_data",
    "data.loading.loader": "loader workers build",
    "data.samples.reader": "source build relative_actions mixed_data",
    "data.normalization.normalizer": "normalization relative_actions mixed_data",
    "data.normalization.relative": "relative_actions",
    "checkpoints.weights": "weights adapter base_weights",
    "checkpoints.finding": "weights base_weights",
    "models.pi.adapter": "adapter weights base_weights",
    "checkpoints.manifest": "checkpoint checkpoint_writer",
    "checkpoints.store": "checkpoint checkpoint_writer best",
    "checkpoints.writer": "checkpoint_writer",
    "checkpoints.host_snapshot": "tensor_file checkpoint_writer",
    "checkpoints.tensor_file": "tensor_file checkpoint_writer weights",
    "checkpoints.tensor_reader": "tensor_file weights",
    "requeue": "requeue slurm_scripts",
}

NOT_MUTATED = (
    m.Annotation()
    | m.Decorator()
    | m.Raise()
    | m.Assert()
    | m.FormattedString()
    | m.If(test=m.Name("TYPE_CHECKING"))
    | m.Call(func=m.Attribute(value=m.Name("log")))
)


def left_out(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    """A call of which nothing is kept is not made."""
    if m.matches(node, m.SimpleStatementLine(body=[m.Expr(value=m.Call())])):
        yield node.with_changes(body=[cst.Pass()])


def turned_around(node: cst.If) -> Iterator[cst.CSTNode]:
    """A condition holds when it does not."""
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test), whitespace_before_test=cst.SimpleWhitespace(" "))


OPERATORS = [entry for entry in mutation_operators if entry[1] is not operator_string]
OPERATORS += [(cst.SimpleStatementLine, left_out), (cst.If, turned_around)]


class Sites(MutationVisitor):
    """What of a module is mutated."""

    METADATA_DEPENDENCIES = (cst.metadata.PositionProvider, OuterFunctionProvider)

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        return m.matches(node, NOT_MUTATED)


@dataclass(frozen=True)
class Mutant:
    """One planted error."""

    module: str
    kind: str
    code: str
    diff: str

    @property
    def key(self) -> str:
        return f"{self.module}-{hashlib.sha256(self.diff.encode()).hexdigest()[:10]}"


def source(module: str) -> Path:
    return Path("src/agent", *module.split(".")).with_suffix(".py")


def nearest(module: str) -> list[str]:
    return [str(next(Path("tests").rglob(f"test_{name}.py"))) for name in NEAREST[module].split()]


def draw(module: str, number: int, seed: int) -> list[Mutant]:
    """Some mutants of a module, evenly over the kinds; the first of them whatever ``number`` is."""
    code = (REPOSITORY / source(module)).read_text(encoding="utf-8")
    wrapper = cst.MetadataWrapper(cst.parse_module(code))
    names: dict[int, str] = {}  # of the kind of mutation that gave a node

    def named(operator: Callable[[Any], Iterable[cst.CSTNode]], node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        for mutated in operator(node):
            names[id(mutated)] = operator.__name__.removeprefix("operator_")
            yield mutated

    sites = Sites([(of, partial(named, operator)) for of, operator in OPERATORS], IgnoredCode(set(), set(), set()))
    wrapper.visit(sites)
    by_kind: dict[str, list[Mutation]] = defaultdict(list)
    for mutation in sites.mutations:
        by_kind[names[id(mutation.mutated_node)]].append(mutation)
    chance, kinds = random.Random(f"{seed}/{module}"), list(by_kind.values())
    for kind in kinds:
        chance.shuffle(kind)
    chance.shuffle(kinds)
    found: list[Mutant] = []
    while any(kinds) and len(found) < number:
        for kind in filter(None, kinds):
            mutation = kind.pop()
            mutated = wrapper.module.deep_replace(mutation.original_node, mutation.mutated_node).code  # type: ignore
            lines = difflib.unified_diff(code.splitlines(), mutated.splitlines(), lineterm="", n=0)
            diff = "\n".join(line for line in lines if not line.startswith(("---", "+++")))
            if diff and len(found) < number and all(other.diff != diff for other in found):
                found.append(Mutant(module, names[id(mutation.mutated_node)], mutated, diff))
    return found


class Copy:
    """A copy of the tree in which mutants are planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
        shutil.copytree(REPOSITORY, folder, symlinks=True, ignore=ignored)
        # Compiled once; nothing is compiled beside a mutant, which may be written in the second in which another was.
        subprocess.run([PYTHON, "-m", "compileall", "-q", str(folder / "src"), str(folder / "tests")], check=True)

    def plant(self, mutant: Mutant, limit: float, left_out: Sequence[str]) -> tuple[str, float]:
        """Runs the tests nearest to a mutant but some; as :meth:`test`."""
        path = self.folder / source(mutant.module)
        unharmed = path.read_text(encoding="utf-8")
        path.write_text(mutant.code, encoding="utf-8")
        Path(cache_from_source(str(path))).unlink(missing_ok=True)
        try:
            return self.test([*nearest(mutant.module), *(f"--deselect={test}" for test in left_out)], limit)
        finally:
            path.write_text(unharmed, encoding="utf-8")
            py_compile.compile(str(path))

    def test(self, files: list[str], limit: float) -> tuple[str, float]:
        """The first test that fails, ``timeout``, or nothing; and the seconds that it took."""
        begin, output = time.monotonic(), self.folder.with_suffix(".log")
        pid = os.fork()
        if pid == 0:
            os._exit(_test_in_fork(self.folder, files, output))
        process = psutil.Process(pid)
        try:
            code = process.wait(limit)
            failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output.read_text(errors="replace"), re.MULTILINE)
            return "" if code == 0 else (failed or [f"exit code {code}"])[0], time.monotonic() - begin
        except psutil.TimeoutExpired:
            return "timeout", time.monotonic() - begin
        finally:
            _end_all(self.folder)
            shutil.rmtree(self.folder.with_suffix(".tmp"), ignore_errors=True)


def _test_in_fork(folder: Path, files: list[str], output: Path) -> int:
    """pytest in a process that has imported everything but the product."""
    os.environ |= {"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # beside nohup and in the background these are ignored, and no
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shell can trap them then
    os.chdir(folder)
    sys.path[:0] = [str(folder / "src"), str(folder / "tests")]
    sys.dont_write_bytecode = True
    sys.modules["__main__"] = ModuleType("__main__")  # this file is of no interest to the processes that a test starts
    from support import forked

    forked.ForkServer.__init__ = _fork_server  # type: ignore[method-assign]
    options = ["-x", "-n0", "-p", "no:cacheprovider", f"--basetemp={folder.with_suffix('.tmp')}", "-rfE"]
    return int(pytest.main([*options, *files]))


def _fork_server(self: Any) -> None:
    """The tests' server of runs, without importing everything anew."""
    from support import forked

    requests, answers = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(requests[0], 0)
        os.dup2(answers[1], 1)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["-c", "tests"]
        exec(forked._SERVER, {"__name__": "__main__"})
        os._exit(0)
    server = psutil.Process(pid)
    pipes = {"stdin": os.fdopen(requests[1], "w"), "stdout": os.fdopen(answers[0])}
    self._process = SimpleNamespace(**pipes, kill=server.kill, communicate=server.wait)
    assert self._process.stdout.readline() == "ready\n"


def _end_all(folder: Path) -> None:
    """Ends what a test has left running: whoever works in the copy or its folder for temporary files."""
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(folder)):
                process.kill()
        except psutil.Error:
            continue


class Results:
    """What became of every mutant, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.by_key: dict[str, dict[str, Any]] = {entry["key"]: entry for entry in map(json.loads, lines)}

    def add(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            self.by_key[entry["key"]] = entry
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        print(f"{entry['key']:32} {entry['kind']:24} {entry['seconds']:6.0f} s  {entry['caught_by'] or 'NOT CAUGHT'}")


def catch(copy: Copy, mutant: Mutant, limit: float, results: Results, again: bool) -> None:
    """Plants a mutant unless it was. A test that fails without it too has not caught it."""
    known, unsound = results.by_key.get(mutant.key), list[str]()
    while True:
        if known is None or (again and not known["caught_by"]):
            caught_by, seconds = copy.plant(mutant, limit, unsound)
            known = {"key": mutant.key, "module": mutant.module, "kind": mutant.kind, "diff": mutant.diff}
            known |= {"caught_by": caught_by, "seconds": round(seconds, 1)}
            results.add(known)
        test, again = known["caught_by"], False
        if not test:
            return
        if test == "timeout":  # it hangs, if without it these tests take far less
            which, few = nearest(mutant.module), limit / 3
        else:
            which, few = [test] if "::" in test else [test, "--collect-only"], limit
        key = f"unharmed {mutant.module if test == 'timeout' else test}"
        if key not in results.by_key:
            failed, seconds = copy.test(which, few)
            results.add({"key": key, "kind": "", "caught_by": failed or "passes", "seconds": round(seconds, 1)})
        if results.by_key[key]["caught_by"] == "passes":
            return
        assert test != "timeout", f"without a mutant the tests of {mutant.module} take long as well: give more --limit"
        unsound.append(test)
        known = None


def report(entries: list[dict[str, Any]]) -> None:
    """A table by module, and the mutants that nobody noticed."""
    survivors = [entry for entry in entries if not entry["caught_by"]]
    for module in dict.fromkeys(entry["module"] for entry in entries):
        of_module = [entry for entry in entries if entry["module"] == module]
        print(f"{module:24} {len(of_module):4} planted {sum(bool(e['caught_by']) for e in of_module):4} caught")
    print(f"{len(entries)} planted, {len(entries) - len(survivors)} caught, {len(survivors)} not:")
    for entry in survivors:
        print(f"\n{entry['key']} ({entry['kind']})\n{entry['diff']}")


def main() -> None:
    """Parses the command line and plants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="results and copies of the tree; 200 MB")
    parser.add_argument("--modules", nargs="*", default=list(NEAREST), choices=list(NEAREST), metavar="MODULE")
    parser.add_argument("--number", type=int, default=8, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=900, help="seconds after which the tests of a mutant hang")
    parser.add_argument("--again", action="store_true", help="also those that were not caught before")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.folder / "results.jsonl")
    os.nice(10)
    os.environ["OMP_NUM_THREADS"] = "1"
    import lerobot.datasets.lerobot_dataset  # noqa: F401
    import torch
    import torch.distributed
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    drawn = [mutant for name in arguments.modules for mutant in draw(name, arguments.number, arguments.seed)]
    copy = Copy(arguments.folder.resolve() / "copy")
    for mutant in drawn:
        catch(copy, mutant, arguments.limit, results, arguments.again)
    report([results.by_key[mutant.key] for mutant in drawn])


if __name__ == "__main__":
    main()
