"""`sweep run --cfg job`: print the composed config and run nothing.

A module of its own, since it needs little of what a run imports.
"""

import sys
from collections.abc import Sequence

from sweep.config.compose import DEFAULT_GRID, expand, to_yaml
from sweep.core.exits import EXIT_DONE


def print_config(overrides: Sequence[str], *, multirun: bool) -> int:
    """Print what the overrides compose to, one YAML document a point. Returns the exit code."""
    grid = expand(overrides, multirun=multirun, default_grid=DEFAULT_GRID)
    sys.stdout.write("---\n".join(to_yaml(point) for point in grid.points))
    return EXIT_DONE
