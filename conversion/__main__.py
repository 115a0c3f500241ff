"""`python -m vamba.conversion SRC DST`: the same as `vamba convert SRC DST`."""

import sys

from vamba.cli import main


raise SystemExit(main(["convert", *sys.argv[1:]]))
