"""`python -m sweep` is `sweep`."""

from sweep.cli import script

if __name__ == "__main__":
    raise SystemExit(script())
