"""Measure PyTorch's layers against their counterparts and write the page: python examples/parity/zoo --help

Exit codes: 0 every row is as it claims, 1 one isn't, or the page on disk isn't what would be written (--check).
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

# The programs are tiny: compiling them is what takes time, and threads would wait for each other.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from zoo import page  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="zoo", description="Measure PyTorch's layers against their counterparts.")
    parser.add_argument("--out", type=Path, help="Write the page here. Left out: print it.")
    parser.add_argument("--check", type=Path, metavar="PAGE", help="Compare with this page, apart from figures.")
    parser.add_argument(
        "--family", choices=[family.FAMILY for family in page.FAMILIES], help="Print this family alone."
    )
    options = parser.parse_args()
    if options.family and (options.out or options.check):
        parser.error("--family prints a part of the page; give it without --out and --check")
    families = [family for family in page.FAMILIES if options.family in (None, family.FAMILY)]
    warnings.simplefilter("ignore")  # of the layers that are measured

    measured = page.measure_families(families, lambda family: print(f"{family.TITLE} ..", file=sys.stderr))
    wrong = page.false_claims(measured)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        return 1
    text = page.render(measured)
    if options.check:
        same = page.without_digits(options.check.read_text(encoding="utf-8")) == page.without_digits(text)
        print(f"{options.check} is {'' if same else 'not '}what is measured", file=sys.stderr)
        return 0 if same else 1
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
