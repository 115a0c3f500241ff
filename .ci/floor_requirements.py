"""Prints the lowest versions that the installed vamba allows, as requirements for pip: `av>=14.0` becomes `av==14.0`.

    python .ci/floor_requirements.py [NAME ...]

Packages named on the command line are left at the newest that is allowed.
"""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement


for requirement in map(Requirement, requires("vamba")):
    if requirement.marker is not None:  # of an extra
        continue
    floors = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    is_pinned = floors and requirement.name not in sys.argv[1:]
    print(f"{requirement.name}=={floors[0]}" if is_pinned else requirement)
