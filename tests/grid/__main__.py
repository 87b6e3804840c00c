"""Every row of the grid through the decode kernel, on one program and on two: `make grid`.

Each row is checked in a process of its own, small rows first. What became of it is appended to a
file, one JSON object a line; a row that is there already, with the same sources of the package, is
not run again. Rows that need more memory than allowed are listed with what they would need.

    python -m tests.grid                                  # hours
    python -m tests.grid --rows 0:40 --memory-gb 8
    python -m tests.grid --summary                        # of what has been run
"""

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import jax_tkg
from tests.cases import GRID, Case
from tests.grid.checking import FORMS, OUT_OF_MEMORY, Result, check_row, form_name, needed_bytes

GIB = 2**30


@dataclass(frozen=True)
class Record:
    """The file of results.

    Attributes:
        path: of the file.
        sources: a digest of the package; results of other sources do not count.
    """

    path: Path
    sources: str

    def results(self) -> list[Result]:
        """The last one of each launch, of these sources."""
        if not self.path.exists():
            return []
        lines = map(json.loads, self.path.read_text().splitlines())
        mine = [Result(**line["result"]) for line in lines if line["sources"] == self.sources]
        return list({(r.case, r.form): r for r in mine}.values())

    def append(self, results: Iterable[Result]) -> None:
        """Writes results at the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            for result in results:
                file.write(json.dumps({"sources": self.sources, "result": asdict(result)}) + "\n")

    def missing(self, cases: Iterable[Case]) -> Iterator[Case]:
        """Rows that lack a launch, or whose launch was skipped."""
        done = Counter(r.case for r in self.results() if r.status != "skipped")
        return (case for case in cases if done[case.name] < len(FORMS))


def digest_of_sources() -> str:
    """Changes with every line of the package."""
    root = Path(jax_tkg.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def in_own_process(case: Case, memory: int) -> list[Result]:
    """Checks a row in a process that may take so many bytes, and gives them all back."""
    command = [sys.executable, "-m", "tests.grid", "--one", case.name]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    found = [Result(**json.loads(line)) for line in done.stdout.splitlines() if line[:1] == "{"]
    left = [form_name(form) for form in FORMS][len(found) :]
    status, last_words = "failed", (done.stderr.strip().splitlines() or [""])[-1][:400]
    if done.returncode == -signal.SIGKILL or any(text in done.stderr for text in OUT_OF_MEMORY):
        status, last_words = "skipped", f"needs more than the {memory:,} bytes allowed"
    reason = f"the process ended with {done.returncode}: {last_words}"
    return found + [Result(case.name, form, status, reason) for form in left]


def too_large(case: Case, memory: int) -> list[Result]:
    """What to note for a row that does not fit."""
    needed = needed_bytes(case)
    reason = f"needs about {needed:,} bytes, allowed are {memory:,}"
    return [Result(case.name, form_name(form), "skipped", reason) for form in FORMS]


def print_summary(results: list[Result], rows: int, console: Console) -> None:
    """A row of the table for each kind of launch; below it, all that did not pass."""
    table = Table(title=f"{rows} rows of the grid")
    states = ("passed", "failed", "refused", "skipped")
    for name in ("launch", *states, "not yet", "instructions", "seconds", "largest GB"):
        table.add_column(name, justify="left" if name == "launch" else "right")
    for form in map(form_name, FORMS):
        mine = [r for r in results if r.form == form]
        count = Counter(r.status for r in mine)
        table.add_row(
            form,
            *(str(count[state]) for state in states),
            str(rows - len(mine)),
            f"{sum(r.instructions for r in mine):,}",
            f"{sum(r.seconds for r in mine):,.0f}",
            f"{max((r.peak_bytes for r in mine), default=0) / 1e9:.1f}",
        )
    console.print(table)
    for result in results:
        if result.status != "passed":
            console.print(
                f"{result.status} {result.case}, {result.form}: {result.message}", markup=False
            )


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=Path("build/grid.jsonl"), help="results")
    parser.add_argument("--rows", default=":", help="first:end, or one row, of the grid's file")
    parser.add_argument("--memory-gb", type=float, default=24, help="what a row may need")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        case = next(case for case in GRID if case.name == given.one)
        for result in check_row(case):
            print(json.dumps(asdict(result)), flush=True)
        return
    first, colon, end = given.rows.partition(":")
    start = int(first or 0)
    cases = sorted(GRID[start : int(end or len(GRID)) if colon else start + 1], key=needed_bytes)
    console, memory = Console(width=160), int(given.memory_gb * GIB)
    record = Record(given.file, digest_of_sources())
    for case in [] if given.summary else record.missing(cases):
        fits = needed_bytes(case) <= memory
        results = in_own_process(case, memory) if fits else too_large(case, memory)
        record.append(results)
        for result in results:
            print(f"{result.status:8}{result.case}, {result.form} {result.message}", flush=True)
    names = {case.name for case in cases}
    results = [r for r in record.results() if r.case in names]
    print_summary(results, len(cases), console)
    sys.exit(any(r.status == "failed" for r in results))


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
