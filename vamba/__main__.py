"""`python -m vamba`: the same as `vamba`, for launchers that start modules."""

from .cli import main


raise SystemExit(main())
