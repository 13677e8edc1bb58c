# SPDX-License-Identifier: MIT
"""keel-bench and the scripts around it: what they write, not how fast anything is."""
import csv
import importlib.util
import json
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import unittest

BIN = pathlib.Path(os.environ["KEEL_BIN"])
ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests/data/models/small-q8.gguf"
TESTS = ["-m", MODEL, "-p", "20,40", "-n", "4", "-d", "0,30", "-r", "3", "-t", "1"]

PEER = """#!/usr/bin/env python3
import json
print(json.dumps([{"n_prompt": p, "n_gen": n, "n_depth": d, "samples_ts": [10.0]}
                  for d in (0, 30) for p, n in ((20, 0), (40, 0), (0, 4))]))
"""


def run(*command, code=0):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == code, (command, done.returncode, done.stderr)
    return done.stderr if code else done.stdout


class Bench(unittest.TestCase):
    def test_json(self):
        record = json.loads(run(BIN / "keel-bench", *TESTS, "-o", "json", "--no-limits"))
        self.assertEqual((record["threads"], record["backend"], record["precision"]), (1, "cpu", "fast"))
        tests = [(r["test"], r["tokens"], r["depth"]) for r in record["results"]]
        self.assertEqual(tests, [(t, n, d) for d in (0, 30) for t, n in (("prefill", 20), ("prefill", 40), ("decode", 4))])
        for r in record["results"]:
            self.assertEqual(len(r["samples"]), 3)
            self.assertEqual(r["tok_s"], sorted(r["samples"])[1])
            self.assertGreater(min(r["samples"]), 0)
            self.assertEqual(r["gb_s"] is None, r["test"] == "prefill")

    def test_limits(self):
        record = json.loads(run(BIN / "keel-bench", *TESTS, "-o", "json"))
        self.assertGreater(record["read_gb_s"], 0)
        self.assertGreater(record["float_gop_s"], 0)
        decode = record["results"][-1]
        bytes_per_token = decode["gb_s"] / decode["tok_s"]
        shares = [bytes_per_token * rate / limit for rate, limit in zip(decode["samples"], decode["reading_gb_s"])]
        self.assertEqual(len(shares), 3)
        self.assertAlmostEqual(decode["share_of_reading"], sorted(shares)[1])

    def test_tables(self):
        rows = list(csv.DictReader(run(BIN / "keel-bench", *TESTS, "-o", "csv", "--no-limits").splitlines()))
        self.assertEqual([r["test"] for r in rows], ["prefill", "prefill", "decode"] * 2)
        self.assertEqual({r["model"] for r in rows}, {"small-q8.gguf"})
        table = run(BIN / "keel-bench", *TESTS, "--no-limits")
        self.assertEqual(len([line for line in table.splitlines() if line.startswith(("| prefill", "| decode"))]), 6)

    def test_errors(self):
        run(BIN / "keel-bench", code=2)
        run(BIN / "keel-bench", "-m", MODEL, "-r", "0", code=2)
        self.assertIn("no-such-file", run(BIN / "keel-bench", "-m", "no-such-file", code=1))

    def test_comparison_and_plot(self):
        with tempfile.TemporaryDirectory() as folder:
            peer = pathlib.Path(folder) / "llama-bench"
            peer.write_text(PEER)
            peer.chmod(peer.stat().st_mode | stat.S_IXUSR)
            printed = run(sys.executable, ROOT / "bench/peers/compare.py", "--peer", folder, "--keel", BIN / "keel-bench",
                          "-m", MODEL, "-p", "20,40", "-n", "4", "-d", "0,30", "-t", "1", "-r", "2", "--results", folder,
                          "--machine", "here")
            self.assertIn("| decode 4 | 30 |", printed)
            table = pathlib.Path(folder) / "here/small-q8.csv"
            rows = list(csv.DictReader(table.read_text().splitlines()))
            self.assertEqual(len(rows), 6)
            for row in rows:
                self.assertEqual(row["peer_tok_s"], "10.0")
                self.assertAlmostEqual(float(row["ratio"]), float(row["keel_tok_s"]) / 10, delta=0.01)
            if importlib.util.find_spec("matplotlib"):
                picture = pathlib.Path(folder) / "plot.png"
                run(sys.executable, ROOT / "bench/plot.py", table, "-o", picture)
                self.assertTrue(picture.read_bytes().startswith(b"\x89PNG"))


if __name__ == "__main__":
    unittest.main()
