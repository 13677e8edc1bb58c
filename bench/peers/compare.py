#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Measures keel and llama.cpp side by side: both benchmarks run on the same file in turns, so that whatever else the
machine does meets both; medians and their ratios are printed and written to bench/results/<machine>/<model>.csv."""
import argparse
import csv
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def numbers(text):
    return [int(n) for n in text.split(",")]


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def keel(a):
    command = [a.keel, "-m", a.model, "-p", a.prompts, "-n", str(a.tokens), "-d", a.depths]
    command += ["-r", str(a.samples), "-o", "json", "-t", str(a.threads)]
    command += ["--backend", a.backend, "--precision", a.precision]
    command += ["--interleave"] if a.interleave else []
    record = run(command)
    return {(r["test"], r["tokens"], r["depth"]): r for r in record["results"]}, record


def peer(a):
    command = [os.path.join(a.peer, "llama-bench"), "-m", a.model, "-p", a.prompts, "-n", str(a.tokens), "-d", a.depths,
               "-r", str(a.samples), "-o", "json", "-t", str(a.threads), *a.peer_options.split()]
    rates = {}
    for r in run(command):
        test = ("prefill", r["n_prompt"], r["n_depth"]) if r["n_prompt"] else ("decode", r["n_gen"], r["n_depth"])
        rates[test] = r["samples_ts"]
    return rates


def machine_name(record):
    """Intel(R) Xeon(R) Processor -> intel-xeon-processor-2t"""
    words = re.sub(r"\([^)]*\)|@.*", "", record["processor"]).lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + f"-{record['threads']}t"


def commit():
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("-m", "--model", required=True)
    p.add_argument("--peer", required=True, help="folder of llama.cpp's executables")
    p.add_argument("--keel", default=str(ROOT / "build/release/bin/keel-bench"), help="keel-bench")
    p.add_argument("-p", "--prompts", default="512,2048", help="prompt lengths")
    p.add_argument("-n", "--tokens", type=int, default=128, help="tokens to decode")
    p.add_argument("-d", "--depths", default="0,8192")
    p.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("-r", "--rounds", type=int, default=5, help="how often each of the two runs")
    p.add_argument("--samples", type=int, default=1, help="in a round; what lies before a depth is computed once for all")
    p.add_argument("--backend", default="cpu")
    p.add_argument("--precision", default="fast")
    p.add_argument("--interleave", action="store_true", help="keel interleaves its weights at loading")
    p.add_argument("--peer-options", default="", help="more options for llama-bench")
    p.add_argument("--results", default=str(ROOT / "bench/results"), help="folder of the machines' folders")
    p.add_argument("--machine", help="name of the folder for the results (default: from the processor)")
    p.add_argument("--note", default="", help="goes into the CSV: what else the machine was doing")
    a = p.parse_args()

    ours, theirs, shares = {}, {}, {}
    load = []
    for i in range(a.rounds):
        load.append(os.getloadavg()[0])
        print(f"round {i + 1} of {a.rounds}, load {load[-1]:.1f}", file=sys.stderr)
        for test, samples in peer(a).items():
            theirs.setdefault(test, []).extend(samples)
        results, about = keel(a)
        for test, r in results.items():
            ours.setdefault(test, []).extend(r["samples"])
            shares.setdefault(test, []).append(r["share_of_reading"])

    rows, weights = [], "interleaved" if a.interleave else "mapped"
    for test in sorted(ours, key=lambda t: (t[0], t[2], t[1])):
        mine, other = statistics.median(ours[test]), statistics.median(theirs[test])
        share = None if None in shares[test] else statistics.median(shares[test])
        rows.append({"date": time.strftime("%Y-%m-%d"), "commit": commit(), "processor": about["processor"],
                     "instruction_set": about["instruction_set"], "threads": about["threads"], "backend": a.backend,
                     "precision": a.precision, "weights": weights,
                     "read_gb_s": round(about["read_gb_s"], 1), "model": about["model"],
                     "test": test[0], "tokens": test[1], "depth": test[2], "keel_tok_s": round(mine, 2),
                     "keel_least": round(min(ours[test]), 2), "keel_most": round(max(ours[test]), 2),
                     "peer_tok_s": round(other, 2), "peer_least": round(min(theirs[test]), 2),
                     "peer_most": round(max(theirs[test]), 2), "ratio": round(mine / other, 2),
                     "share_of_reading": "" if share is None else round(share, 3), "rounds": a.rounds * a.samples,
                     "load": round(statistics.mean(load), 1), "note": a.note})

    print(f"\n{about['model']}, {about['processor']}, {about['threads']} threads, keel {about['instruction_set']} "
          f"{a.precision}, weights {weights}, medians of {a.rounds} rounds of {a.samples}, "
          f"load {statistics.mean(load):.1f}\n")
    print("| test | depth | keel tok/s | llama.cpp tok/s | ratio | of reading limit |\n|---|---:|---:|---:|---:|---:|")
    for r in rows:
        share = f"{100 * r['share_of_reading']:.0f} %" if r["share_of_reading"] != "" else ""
        print(f"| {r['test']} {r['tokens']} | {r['depth']} | {r['keel_tok_s']:.1f} ({r['keel_least']:.1f} to "
              f"{r['keel_most']:.1f}) | {r['peer_tok_s']:.1f} ({r['peer_least']:.1f} to {r['peer_most']:.1f}) | "
              f"{r['ratio']:.2f} | {share} |")

    folder = pathlib.Path(a.results) / (a.machine or machine_name(about))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (pathlib.Path(a.model).stem + ".csv")
    if target.exists():  # what was not measured this time stays
        def what(r):
            return (r["test"], str(r["tokens"]), str(r["depth"]), r["backend"], r["precision"], r["weights"])

        measured = {what(r) for r in rows}
        with open(target, newline="", encoding="utf-8") as file:
            rows += [r for r in csv.DictReader(file) if what(r) not in measured]
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{target}")


if __name__ == "__main__":
    main()
