"""From the points of a grid to trials, the cells that answer them, and the tasks that workers score."""
