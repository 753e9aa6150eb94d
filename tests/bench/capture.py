"""Capture alone: everything at once, and in windows of decoder layers.

python -m tests.bench.capture --device cuda --model qwen3_vl_4b_shape
"""

# pyright: basic

import argparse

from tests.bench.setup import peak_gb, report, seconds, subject
from workers.scoring.capture import capture
from workers.scoring.windows import captures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["tiny", "qwen3_vl_4b_shape"], default="tiny")
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    bench = subject(args.model, args.device)
    groups, segments = bench.tasks[0].groups, bench.plan.segments
    parts = list(dict.fromkeys(group.part for group in groups))
    share = -(-len(parts) // args.windows)
    windows: list[list[str]] = []
    for start in range(0, len(parts), share):
        some = parts[start : start + share]
        windows.append([name for group in groups if group.part in some for name in group.modules])
    everything = [name for window in windows for name in window]

    def windowed() -> None:
        for _, rows in captures(bench.model, segments, windows):
            rows.clear()

    capture(bench.model, segments, everything)  # warm
    with peak_gb(bench.device) as whole:
        whole_seconds = seconds(lambda: capture(bench.model, segments, everything), bench.device)
    with peak_gb(bench.device) as windows_peak:
        windowed_seconds = seconds(windowed, bench.device)
    figures = {
        "model": args.model,
        "seconds": whole_seconds,
        **whole,
        "windows": len(windows),
        "windowed_seconds": windowed_seconds,
    }
    report("capture", bench.device, {**figures, "windowed_peak_gb": windows_peak["peak_gb"]})


if __name__ == "__main__":
    main()
