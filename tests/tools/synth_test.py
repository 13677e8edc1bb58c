# SPDX-License-Identifier: MIT
"""`keel synth` writes files that keel runs, the same ones for the same seed."""
import hashlib
import json
import math
import os
import subprocess
import tempfile
import unittest

KEEL = os.path.join(os.environ["KEEL_BIN"], "keel")


def keel(*arguments, code=0):
    done = subprocess.run([KEEL, *arguments], capture_output=True, text=True)
    assert done.returncode == code, (arguments, done.returncode, done.stderr)
    return done.stderr if code else done.stdout


class Synth(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def path(self, name):
        return os.path.join(self.folder, name)

    def digest(self, name):
        with open(self.path(name), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    def test_same_seed_same_file(self):
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
            keel("synth", "tiny", self.path(name), "--seed", seed)
        self.assertEqual(self.digest("a"), self.digest("b"))
        self.assertNotEqual(self.digest("a"), self.digest("c"))

    def test_every_type_runs(self):
        ids = ",".join(str(7 * i % 1024) for i in range(600))
        for kind in ("f32", "f16", "bf16", "q8_0", "q4_k_m"):
            with self.subTest(kind):
                keel("synth", "tiny", self.path(kind), "--type", kind)
                result = json.loads(keel("eval", "-m", self.path(kind), "--ids", ids))
                self.assertEqual(result["n"], 600)
                self.assertTrue(all(math.isfinite(t["logit"]) and abs(t["logit"]) < 100 for t in result["top"]))

    def test_mixture_and_layers(self):
        keel("synth", "tiny", self.path("m"), "--layers", "2")
        about = json.loads(keel("inspect", self.path("m"), "--json"))
        self.assertEqual((about["model"]["layers"], about["model"]["mla_layers"]), (2, []))
        self.assertTrue({"Q4_K", "Q5_0", "Q6_K"} <= {t["type"] for t in about["types"]})

    def test_tokenizer(self):
        keel("synth", "tiny", self.path("t"))
        text = "Round trip of any text: 日本 <|im_end|>"
        ids = subprocess.run([KEEL, "tokenize", "-m", self.path("t"), "--special"], input=text.encode(),
                             capture_output=True, check=True).stdout
        self.assertIn(1024 - 254, json.loads(ids))
        back = subprocess.run([KEEL, "detokenize", "-m", self.path("t")], input=ids, capture_output=True, check=True)
        self.assertEqual(back.stdout.decode(), text)

    def test_errors(self):
        self.assertIn("preset big", keel("synth", "big", self.path("x"), code=1))
        self.assertIn("q9", keel("synth", "tiny", self.path("x"), "--type", "q9", code=1))
        self.assertIn("--layers 99", keel("synth", "tiny", self.path("x"), "--layers", "99", code=1))
        keel("synth", "tiny", self.path("x"))
        self.assertIn("exists", keel("synth", "tiny", self.path("x"), code=1))


if __name__ == "__main__":
    unittest.main()
