"""Exit codes of the command line."""

from typing import Final

EXIT_DONE: Final = 0
EXIT_WRONG_INPUT: Final = 2  # one message on standard error; nothing was written
EXIT_FAILED: Final = 3  # finished, but some trials have failed
EXIT_INCOMPLETE: Final = 75  # interrupted; the same command resumes
