#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The executable keel from the outside: what it prints, and what it says when something is wrong."""
import array
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

KEEL = os.path.join(os.environ["KEEL_BIN"], "keel")
DATA = pathlib.Path(__file__).parent / "data"
TINY = str(DATA / "models" / "tiny-f32.gguf")


def keel(*arguments, text=None, code=0):
    done = subprocess.run([KEEL, *map(str, arguments)], input=text, capture_output=True, timeout=120)
    if done.returncode != code:
        raise AssertionError(f"keel {arguments}: exit code {done.returncode}, {done.stderr.decode()}")
    return done.stdout if code == 0 else done.stderr.decode()


def golden(name):
    return json.loads((DATA / "golden" / f"{name}.json").read_text())


class Cli(unittest.TestCase):
    def test_eval_meets_the_oracle_whole_and_split(self):
        for backend in ("cpu", "reference"):
            for prompt in golden("tiny-f32")["prompts"][:3]:
                for split in (None, 1, 16):
                    with tempfile.TemporaryDirectory() as folder:
                        row = os.path.join(folder, "row.f32")
                        extra = ["--split", split] if split else []
                        result = json.loads(keel("eval", "-m", TINY, "--ids", ",".join(map(str, prompt["tokens"])),
                                                 "--precision", "exact", "--backend", backend, "--logits", row, *extra))
                        found = array.array("f", pathlib.Path(row).read_bytes())
                    expected = array.array("f", (DATA / "golden" / prompt["logits_file"]).read_bytes())
                    self.assertEqual(len(found), len(expected))
                    error = math.dist(found, expected) / math.hypot(*expected)
                    self.assertLessEqual(error, 1e-5)
                    self.assertEqual(result["n"], prompt["length"])
                    self.assertEqual([t["id"] for t in result["top"]], [t["id"] for t in prompt["top10"]])
                    if prompt["mean_nll"] is not None:
                        self.assertAlmostEqual(result["mean_nll"], prompt["mean_nll"], delta=1e-5)

    def test_greedy_generation_meets_the_oracle(self):
        greedy = golden("tiny-f32")["greedy"]
        result = json.loads(keel("generate", "-m", TINY, "--ids", ",".join(map(str, greedy["tokens"])), "-n",
                                 len(greedy["ids"]), "--temp", 0, "--json"))
        self.assertEqual(result["prompt_ids"], greedy["tokens"])
        self.assertEqual(result["ids"], greedy["ids"])

    def test_the_demonstration_model_tells_a_story(self):
        out = keel("generate", "-p", "Once upon a time", "-n", 40, "--seed", 3).decode()
        self.assertTrue(out.startswith("Once upon a time"))
        self.assertRegex(out, r"prompt 6 tokens, .* tok/s \| decode 40 tokens, .* tok/s, .* GB/s \| first token after .* ms\n$")
        self.assertEqual(out.split("\n\n")[0], keel("generate", "-p", "Once upon a time", "-n", 40, "--seed", 3).decode().split("\n\n")[0])

    def test_tokens_and_text(self):
        text = "Hello, world! Naïve café 你好 <|im_end|> \xff"
        raw = text.encode("latin-1", "ignore") + "你好".encode() + b"\xff\xfe"
        ids = json.loads(keel("tokenize", text=raw))
        self.assertEqual(keel("detokenize", text=json.dumps(ids).encode()), raw)
        end = json.loads(keel("tokenize", "--special", text=b"<|im_end|>"))
        self.assertEqual(len(end), 1)
        self.assertGreater(len(json.loads(keel("tokenize", text=b"<|im_end|>"))), 1)
        self.assertEqual(json.loads(keel("tokenize", "--pieces", text=b"HelloWorld 1234")), ["Hello", "World", " ", "123", "4"])

    def test_inspect_tells_what_a_file_holds(self):
        about = json.loads(keel("inspect", TINY, "--json", "--ctx", 1000))
        self.assertEqual(about["architecture"], "kimi-linear")
        self.assertEqual(about["model"]["mla_layers"], [3])
        self.assertEqual(sum(t["parameters"] for t in about["types"]), about["parameters"])
        self.assertEqual(about["memory"]["cache"], 5 * 256 * 40 * 2)  # and one more
        self.assertIn("kimi-linear", keel("inspect").decode())

    def test_a_conversation(self):
        with tempfile.TemporaryDirectory() as folder:
            saved = os.path.join(folder, "chat.keel")
            lines = ["/tokens", "Hello", "/tokens", "/undo", "/tokens", "/undo", "Again", "/fork", "More", "/branch 1",
                     "/retry", "/edit Other", f"/save {saved}", f"/load {saved}", "/branch 7", "/load /nowhere", "/help",
                     "/save", "/load", "/edit", "/tokens", "/edit " + "far too long " * 300, "/tokens"]
            done = subprocess.run([KEEL, "chat", "--seed", "1", "--ctx", "600"], input="\n".join(lines).encode(),
                                  capture_output=True, timeout=300)
            said = done.stderr.decode()
            self.assertEqual(done.returncode, 0, said)
            for part in ("0 of 600 tokens", "there is no turn yet", "branch 2", "number from 1 to 2", "/nowhere", "/retry answers again",
                         "/save needs a file name", "/load needs a file name", "/edit needs the new text", "the message takes"):
                self.assertIn(part, said)
            counts = re.findall(r"(\d+) of 600 tokens", said)
            self.assertEqual(counts[0], counts[2])  # undone
            self.assertEqual(counts[-1], counts[-2])  # an error changes nothing
            self.assertTrue(os.path.exists(saved))

    def test_errors_name_the_thing(self):
        for arguments, word in (
            (["inspect", "/nowhere.gguf"], "/nowhere.gguf"),
            (["eval", "-m", TINY, "--ids", "1,2,512"], "token 512"),
            (["eval", "-m", TINY, "--ids", "1,2,-1"], "token -1"),
            (["generate", "-m", TINY, "--ids", "1,2,3", "--ctx", "2"], "context"),
            (["generate", "-m", TINY, "--ids", "1", "--ctx", "5000"], "4096"),
            (["generate", "-m", str(DATA / "golden" / "tiny-f32.json"), "-p", "x"], "tiny-f32.json"),
            (["generate", "-p", "x", "--temp", "-1"], "temperature"),
            (["generate", "-f", "/nowhere.txt"], "/nowhere.txt"),
        ):
            self.assertIn(word, keel(*arguments, code=1))
        with tempfile.NamedTemporaryFile(suffix=".gguf") as empty:
            self.assertIn("is empty", keel("inspect", empty.name, code=1))
        for arguments in ([], ["dance"], ["generate"], ["generate", "-p", "x", "--backend", "abacus"], ["eval", "--ids", "x"]):
            keel(*arguments, code=2)


if __name__ == "__main__":
    unittest.main()
