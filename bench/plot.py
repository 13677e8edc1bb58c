#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""plot.py CSV... -o OUT.png: tok/s over depth and over prompt length, from what compare.py or `keel-bench -o csv` wrote."""
import argparse
import csv
import sys


def read(paths):
    """Lines of the two charts: {chart: {label: [(x, tok/s)]}}."""
    charts = {"decode over depth": {}, "prefill over depth": {}, "prefill over prompt length": {}}
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            engines = {"keel": row.get("keel_tok_s") or row.get("tok_s"), "llama.cpp": row.get("peer_tok_s")}
            tokens, depth = int(row["tokens"]), int(row["depth"])
            for engine, rate in engines.items():
                if not rate:
                    continue
                label = f"{engine}, {row['model']}, {row['threads']} threads"
                if engine == "keel" and row.get("weights") == "interleaved":
                    label += ", interleaved"
                if row["test"] == "decode":
                    charts["decode over depth"].setdefault(label, []).append((depth, float(rate)))
                else:
                    charts["prefill over depth"].setdefault(f"{label}, {tokens}", []).append((depth, float(rate)))
                    charts["prefill over prompt length"].setdefault(f"{label}, depth {depth}", []).append(
                        (tokens, float(rate)))
    return charts


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("csv", nargs="+")
    p.add_argument("-o", "--out", required=True)
    a = p.parse_args()
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot.py needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(18, 5))
    for axis, (title, lines) in zip(axes, read(a.csv).items()):
        for label, points in sorted(lines.items()):
            axis.plot(*zip(*sorted(points)), marker="o", linestyle="--" if label.startswith("llama") else "-", label=label)
        axis.set(title=title, ylabel="tok/s", xlabel="tokens", ylim=(0, None))
        axis.grid(alpha=0.3)
        if lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(a.out, dpi=120)


if __name__ == "__main__":
    main()
