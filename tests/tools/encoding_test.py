# SPDX-License-Identifier: MIT
"""`keel quantize`, `imatrix` and `perplexity` from the outside."""
import json
import os
import pathlib
import pty
import re
import subprocess
import tempfile
import unittest

KEEL = os.path.join(os.environ["KEEL_BIN"], "keel")
MODEL = str(pathlib.Path(__file__).parents[1] / "data" / "models" / "mid-bf16.gguf")
TEXT = "the old man and the sea are in the water, and she was not there. " * 40


def keel(*arguments, code=0):
    done = subprocess.run([KEEL, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (arguments, done.returncode, done.stderr)
    return done.stderr if code else done.stdout


def perplexity(*arguments):
    return json.loads(keel("perplexity", *arguments, "--ctx", 64, "--precision", "exact", "--json"))


class Encoding(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.text = self.folder / "text"
        self.text.write_text(TEXT)

    def test_threads_do_not_change_the_file(self):
        for threads in (1, 3):
            keel("quantize", MODEL, self.folder / f"{threads}", "q4_k_m", "-t", threads)
        self.assertEqual((self.folder / "1").read_bytes(), (self.folder / "3").read_bytes())

    def test_a_terminal_is_told_how_long_it_takes_and_a_pipe_is_not(self):
        large = self.folder / "large"  # a hundred million weights, so that no machine is done in a third of a second
        keel("synth", "small", large, "--layers", 4, "--type", "bf16")
        slow = [KEEL, "quantize", large, self.folder / "out", "iq4_nl", "-t", "1", "--force"]
        screen, terminal = pty.openpty()
        with subprocess.Popen(slow, stdout=subprocess.DEVNULL, stderr=terminal) as running:
            os.close(terminal)
            shown = b""
            try:
                while part := os.read(screen, 4096):
                    shown += part
            except OSError:  # how Linux ends a terminal
                pass
        os.close(screen)
        self.assertEqual(running.returncode, 0)
        drawn = re.findall(rb"\rquantize \[(#*)( *)\] +(\d+) %, \d+ s left", shown)
        self.assertGreater(len(drawn), 1)
        for done, left, percent in drawn:
            self.assertEqual(len(done) + len(left), 30)
            self.assertAlmostEqual(len(done) / 30, int(percent) / 100, delta=0.04)
        self.assertEqual(sorted(int(percent) for _, _, percent in drawn), [int(percent) for _, _, percent in drawn])
        self.assertTrue(shown.endswith(b"\r\33[K"))  # nothing stays of it
        self.assertEqual(subprocess.run(slow, capture_output=True, check=True).stderr, b"")

    def test_split_size(self):
        keel("quantize", MODEL, self.folder / "out.gguf", "bf16", "--split-size", "1M")
        parts = sorted(self.folder.glob("out-*.gguf"))
        self.assertGreater(len(parts), 2)
        self.assertEqual(json.loads(keel("inspect", parts[0], "--json"))["shards"], len(parts))

    def test_perplexity_is_that_of_the_second_halves(self):
        found = perplexity("-m", MODEL, "-f", self.text)
        ids = json.loads(keel("tokenize", "-m", MODEL, "-f", self.text))
        nll = count = 0
        for i in range(0, len(ids) - 63, 64):
            chunk = ids[i : i + 64]
            part = [json.loads(keel("eval", "-m", MODEL, "--precision", "exact", "--ids", ",".join(map(str, x))))
                    for x in (chunk, chunk[:33])]
            nll += part[0]["mean_nll"] * 63 - part[1]["mean_nll"] * 32
            count += 31
        self.assertEqual(found["tokens"], count)
        self.assertAlmostEqual(found["mean_nll"], nll / count, delta=1e-5)
        self.assertGreater(found["perplexity_error"], 0)

    def test_perplexity_of_a_whole_text_is_that_of_one_session(self):
        result = json.loads(keel("perplexity", "-m", MODEL, "-f", self.text, "--whole", "--precision", "exact", "--json"))
        ids = json.loads(keel("tokenize", "-m", MODEL, "-f", self.text))
        alone = json.loads(keel("eval", "-m", MODEL, "--precision", "exact", "--ids", ",".join(map(str, ids))))
        self.assertEqual(result["tokens"], len(ids) - 1)
        self.assertEqual(sum(t["tokens"] for t in result["tenths"]), len(ids) - 1)
        self.assertAlmostEqual(result["whole"]["mean_nll"], alone["mean_nll"], delta=1e-5)
        self.assertAlmostEqual(sum(t["mean_nll"] * t["tokens"] for t in result["tenths"]) / (len(ids) - 1),
                               alone["mean_nll"], delta=1e-5)

    def test_divergence_from_itself_is_nothing_and_grows_with_fewer_bits(self):
        base = self.folder / "base"
        perplexity("-m", MODEL, "-f", self.text, "--save-logits", base)
        found = perplexity("-m", MODEL, "--kld-base", base)
        self.assertAlmostEqual(found["kld_mean"], 0, delta=1e-6)
        self.assertGreater(found["top1_agreement"], 0.99)
        last = 1e-6
        for kind in ("q8_0", "q5_0", "q2_k"):
            keel("quantize", MODEL, self.folder / kind, kind)
            found = perplexity("-m", self.folder / kind, "--kld-base", base)
            self.assertGreater(found["kld_mean"], last)
            self.assertLessEqual(found["kld_median"], found["kld_99"])
            last = 2 * found["kld_mean"]

    def test_importance(self):
        importance = self.folder / "importance"
        keel("imatrix", "-m", MODEL, "-f", self.text, importance, "--ctx", 64)
        keel("quantize", MODEL, self.folder / "a", "q4_0")
        keel("quantize", MODEL, self.folder / "b", "q4_0", "--imatrix", importance)
        base = self.folder / "base"
        perplexity("-m", MODEL, "-f", self.text, "--save-logits", base)
        plain, weighted = (perplexity("-m", self.folder / f, "--kld-base", base)["kld_mean"] for f in "ab")
        self.assertLess(weighted, plain)
        self.assertIn("exists", keel("imatrix", "-m", MODEL, "-f", self.text, importance, code=1))

    def test_what_is_wrong_is_said(self):
        out, base = self.folder / "out", self.folder / "base"
        out.write_text("precious")
        self.assertIn("exists", keel("quantize", MODEL, out, "q8_0", code=1))
        self.assertEqual(out.read_text(), "precious")
        self.assertIn("q9", keel("quantize", MODEL, self.folder / "no", "q9", code=1))
        self.assertIn("attn_q", keel("quantize", MODEL, self.folder / "no", "q8_0", "--tensor-type", "attn_q", code=1))
        self.assertIn("general.type", keel("quantize", MODEL, self.folder / "no", "q8_0", "--imatrix", MODEL, code=1))
        self.assertIn("tiktoken.model", keel("convert", self.folder, self.folder / "no", code=1))
        self.text.write_text("short")
        self.assertIn("64 are needed", keel("perplexity", "-m", MODEL, "-f", self.text, "--ctx", 64, code=1))
        base.write_text("_logits_ and nothing else")
        self.assertIn(str(base), keel("perplexity", "-m", MODEL, "--kld-base", base, code=1))
        self.assertFalse((self.folder / "no").exists())


if __name__ == "__main__":
    unittest.main()
