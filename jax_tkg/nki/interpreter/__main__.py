"""The command: `run FILE:KERNEL ...` and `check FILE[:KERNEL]`; `--help` says more."""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_tkg.nki.interpreter import report
from jax_tkg.nki.interpreter.dtypes import as_dtype
from jax_tkg.nki.interpreter.errors import NkiError
from jax_tkg.nki.interpreter.launch import run
from jax_tkg.nki.interpreter.lint import Severity, check
from jax_tkg.nki.interpreter.modules import installed

_EXAMPLE = """example:
  python -m jax_tkg.nki.interpreter run kernels.py:tiled_matmul 512x128:bfloat16 512x640:bfloat16 \\
      --programs 1 --timeline matmul.png --trace matmul.json

arguments of a kernel: SHAPE:DTYPE for an array of normal random numbers (integers: 0 to 7), such as
4x128x64:float32; FILE.npy for a stored one; NAME=VALUE, a Python literal, for anything else."""


def load_kernel(place: str) -> Any:
    """The function `FILE:NAME`, with `import nki` finding the interpreter."""
    file, _, name = place.rpartition(":")
    if not file:
        raise SystemExit(f"{place}: write FILE:KERNEL.")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SystemExit(f"{file}: no such Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        with installed(over_real=True):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    if not hasattr(module, name):
        raise SystemExit(f"{file} has no {name}.")
    return getattr(module, name)


def parse_argument(text: str, random: np.random.Generator) -> tuple[str | None, Any]:
    """One argument of the kernel: its name, if it has one, and its value."""
    name, equals, value = text.partition("=")
    if equals:
        if ":" in value or value.endswith(".npy"):
            return name, parse_argument(value, random)[1]
        try:
            return name, ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return name, value
    if text.endswith(".npy"):
        return None, np.load(text)
    shape, _, kind = text.partition(":")
    try:
        sizes = [int(n) for n in shape.split("x")]
        dtype = as_dtype(kind or "float32")
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{text}: write SHAPE:DTYPE, such as 128x64:bfloat16 ({error}).") from None
    if dtype.is_float:
        return None, random.normal(size=sizes).astype(dtype.numpy)
    return None, random.integers(0, 8, sizes).astype(dtype.numpy)


def run_command(args: argparse.Namespace) -> int:
    """Runs a kernel, prints what it did, draws it."""
    random = np.random.default_rng(args.random_seed)
    given = [parse_argument(text, random) for text in args.arguments]
    kernel = load_kernel(args.kernel)
    try:
        done = run(
            kernel,
            *[value for name, value in given if name is None],
            programs=args.programs,
            target=args.target,
            exact=args.exact,
            seed=args.seed,
            **{name: value for name, value in given if name is not None},
        )
    except NkiError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    print(report.summary(done))
    for path, write in ((args.timeline, report.draw_timeline), (args.trace, report.write_trace)):
        if path:
            write(done, path)
            print(f"wrote {path}")
    return 0


def check_command(args: argparse.Namespace) -> int:
    """Prints what the compiler would not accept; 1 if it would refuse something."""
    refused = 0
    for place in args.places:
        file, _, name = place.rpartition(":") if ":" in place else (place, "", None)
        findings = check(Path(file), name)
        for finding in findings:
            print(finding)
        refused += sum(finding.severity is Severity.REFUSED for finding in findings)
    print(f"{refused} refused")
    return 1 if refused else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "jax_tkg.nki.interpreter",
        description="Runs and checks NKI kernels without a Neuron device.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="run | check")
    runs = commands.add_parser("run", help="run a kernel and show checks, counters and time")
    runs.add_argument("kernel", help="FILE:KERNEL")
    runs.add_argument("arguments", nargs="*", help="SHAPE:DTYPE, FILE.npy or NAME=VALUE")
    runs.add_argument("--programs", type=int, choices=(1, 2), help="of a logical core")
    runs.add_argument("--target", default="trn2", help="trn1, trn2 (default) or trn3")
    runs.add_argument("--exact", action="store_true", help="keep all floats as float32")
    runs.add_argument("--seed", type=int, help="shuffle the interleaving of two programs")
    runs.add_argument("--random-seed", type=int, default=0, help="of the random arrays")
    runs.add_argument("--timeline", help="draw to this .png or .svg (needs matplotlib)")
    runs.add_argument("--trace", help="write a trace for Perfetto to this .json")
    runs.set_defaults(command=run_command)
    checks = commands.add_parser("check", help="report what the NKI compiler would not accept")
    checks.add_argument("places", nargs="+", help="FILE or FILE:KERNEL")
    checks.set_defaults(command=check_command)
    args = parser.parse_args(argv)
    return int(args.command(args))


if __name__ == "__main__":
    sys.exit(main())
