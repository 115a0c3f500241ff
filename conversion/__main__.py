"""`python -m vamba.conversion SRC DST`: the same as `vamba convert SRC DST`."""

from .command_line import main


raise SystemExit(main())
