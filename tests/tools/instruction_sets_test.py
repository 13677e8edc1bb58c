# SPDX-License-Identifier: MIT
"""The executables carry code for several instruction sets: each one agrees with the oracle where the machine has it, is
refused where not, and none can get into the way of another."""
import array
import glob
import json
import math
import os
import pathlib
import subprocess
import tempfile
import unittest

BIN = pathlib.Path(os.environ["KEEL_BIN"])
DATA = pathlib.Path(__file__).resolve().parents[1] / "data"
# model: relative error of the last row and error of the mean likelihood in fast precision, as in tests/model/golden.hpp
TOLERANCES = {"tiny-f32": (3e-3, 5e-3), "mid-f16": (5e-3, 5e-3), "mid-bf16": (2e-2, 3e-2), "small-q8": (1e-1, 5e-2)}
EOS = 481  # of these models: where `keel generate` stops


def keel(*arguments, isa=None):
    environment = {**os.environ, **({"KEEL_ISA": isa} if isa else {})}
    return subprocess.run([BIN / "keel", *map(str, arguments)], capture_output=True, text=True, env=environment)


def carried():
    """The names of the sets in the executable, from its own message."""
    refused = keel("eval", "--ids", "1", isa="none")
    assert refused.returncode == 1 and "none" in refused.stderr, refused
    return refused.stderr.strip().rpartition(": ")[2].split(", ")


def here():
    """Those of them that this machine runs. The others must be refused by name, not die of an unknown instruction."""
    for isa in carried():
        done = keel("eval", "--ids", "1", isa=isa)
        if done.returncode == 0:
            yield isa
        else:
            assert done.returncode == 1 and isa in done.stderr, done


def objects(executable):
    return {path.rpartition("_")[2][:-2]: path for path in glob.glob(str(BIN.parent / "*" / f"{executable}_*.o"))}


class InstructionSets(unittest.TestCase):
    def evaluate(self, isa, *arguments):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "logits"
            done = keel("eval", *arguments, "--logits", path, isa=isa)
            self.assertEqual(done.returncode, 0, done.stderr)
            return json.loads(done.stdout), array.array("f", path.read_bytes())

    def check_golden(self, isa, model, precision, logits_allowed, nll_allowed, *arguments):
        for prompt in json.loads((DATA / f"golden/{model}.json").read_text())["prompts"]:
            for split in ([], ["--split", "1"]) if prompt["length"] == 65 else ([],):
                result, logits = self.evaluate(isa, "-m", DATA / f"models/{model}.gguf", "--precision", precision,
                                               "--ids", ",".join(map(str, prompt["tokens"])), *split, *arguments)
                expected = array.array("f", (DATA / "golden" / prompt["logits_file"]).read_bytes())
                error = math.dist(logits, expected) / math.hypot(*expected)
                self.assertLessEqual(error, logits_allowed, (isa, model, precision, prompt["length"], split))
                if prompt["mean_nll"] is not None:
                    self.assertAlmostEqual(result["mean_nll"], prompt["mean_nll"], delta=nll_allowed)

    def check_greedy(self, isa, model, precision, *arguments):
        golden = json.loads((DATA / f"golden/{model}.json").read_text())["greedy"]
        done = keel("generate", "-m", DATA / f"models/{model}.gguf", "--precision", precision, "--temp", 0, "--json",
                    "--ids", ",".join(map(str, golden["tokens"])), "-n", len(golden["ids"]), *arguments, isa=isa)
        self.assertEqual(done.returncode, 0, done.stderr)
        expected = golden["ids"][:golden["ids"].index(EOS)] if EOS in golden["ids"] else golden["ids"]
        self.assertEqual(json.loads(done.stdout)["ids"], expected, (isa, model, precision))

    def test_agree_with_the_oracle(self):
        for isa in here():
            for model, allowed in TOLERANCES.items():
                with self.subTest(isa=isa, model=model):
                    self.check_golden(isa, model, "exact", 1e-5, 1e-5)
                    self.check_golden(isa, model, "fast", *allowed)
                    self.check_greedy(isa, model, "exact")
                    self.check_greedy(isa, model, "fast")
            self.check_golden(isa, "small-q8", "fast", *TOLERANCES["small-q8"], "--interleave")
            self.check_greedy(isa, "small-q8", "fast", "--interleave")

    def test_demonstration_model(self):
        golden = json.loads((DATA / "demo/golden.json").read_text())
        for isa in here():
            for name, expected in golden["models"]["Q4_K_M"].items():
                for allowed, *arguments in ((1e-5, "exact"), (2e-2, "fast"), (2e-2, "fast", "--interleave")):
                    with self.subTest(isa=isa, name=name, arguments=arguments):
                        ids = ",".join(map(str, golden["tokens"][name]))
                        result, logits = self.evaluate(isa, "--ids", ids, "--precision", *arguments)
                        self.assertAlmostEqual(result["mean_nll"], expected["mean_nll"], delta=allowed)
                        size = expected["logits_l2"]
                        self.assertAlmostEqual(math.hypot(*logits) / size, 1, delta=allowed)
                        for top in expected["top10"]:
                            self.assertAlmostEqual(logits[top["id"]], top["logit"], delta=allowed * size / 10)

    def test_errors_cross_the_border(self):
        for isa in here():
            missing = keel("eval", "-m", "no-such-file", "--ids", "1", isa=isa)
            self.assertEqual((missing.returncode, "no-such-file" in missing.stderr), (1, True), missing)
            outside = keel("eval", "--ids", "999999", isa=isa)
            self.assertEqual((outside.returncode, "token 999999" in outside.stderr), (1, True), outside)

    def test_the_memory_plan_is_that_of_the_set(self):
        parts = ("weights", "tokenizer", "workspace", "state", "cache", "tokens", "checkpoints")
        for isa in here():
            plan = json.loads(keel("inspect", "--json", isa=isa).stdout)["memory"]
            self.assertEqual(plan["total"], sum(plan[part] for part in parts))
        self.assertEqual(keel("inspect", isa="none").returncode, 1)

    def test_only_the_entries_are_global(self):
        if len(carried()) == 1:
            self.skipTest("this executable has one copy")
        for executable, entry in (("keel_tool", "cpu_code"), ("keel_bench", "make_cpu")):
            for isa, path in objects(executable).items():
                with self.subTest(path):
                    names = subprocess.run(["nm", "--defined-only", "--extern-only", "-P", path], capture_output=True,
                                           text=True, check=True).stdout.splitlines()
                    self.assertEqual(len(names), 1, names[:5])
                    self.assertIn(entry, names[0])
                    self.assertIn(isa, names[0])
                    # What runs before main() would run on every processor; what is in a COMDAT group could be dropped
                    # in favour of another set's copy.
                    sections = subprocess.run(["readelf", "--wide", "--sections", "--section-groups", path],
                                              capture_output=True, text=True, check=True).stdout
                    self.assertNotRegex(sections, r"\s\.(preinit_array|init_array|ctors)\b")
                    self.assertIn("There are no section groups in this file", sections)
        self.assertEqual(set(objects("keel_tool")), set(carried()))


if __name__ == "__main__":
    unittest.main()
