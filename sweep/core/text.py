"""Text for the screen: counts, durations, overrides to type."""

import re
import shlex


def count(n: int, noun: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def quoted(value: str) -> str:
    """A text as the value of an override, whatever characters it has."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def override(key: str, value: str) -> str:
    """An override as a shell takes it: ``dataset.path=a.txt``, ``'dataset.path="my chats.jsonl"'``."""
    if re.fullmatch(r"[\w@%+:./~-]+", value, re.ASCII):
        return f"{key}={value}"
    return shlex.quote(f"{key}={quoted(value)}" if re.search(r"[\\'\"]", value) else f'{key}="{value}"')
