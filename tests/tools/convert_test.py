# SPDX-License-Identifier: MIT
"""`keel convert` from the outside: every value of a small sharded checkpoint, with readers of both formats that are
not keel's, and what the command line says."""
import array
import json
import math
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import unittest

KEEL = os.path.join(os.environ["KEEL_BIN"], "keel")
MAKE = pathlib.Path(__file__).parents[2] / "tools" / "make_checkpoint.py"


def keel(*arguments, code=0):
    done = subprocess.run([KEEL, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (arguments, done.returncode, done.stderr)
    assert code or done.stderr == "", done.stderr  # into a pipe goes no progress bar
    return done.stderr if code else done.stdout


def floats(data, wide):
    """Elements of F32, or of BF16, which is the upper half of one."""
    if not wide:
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    return array.array("f", data)


def read_checkpoint(folder):
    """name: (shape, slowest first; values)."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        for name, t in json.loads(raw[8 : 8 + length]).items():
            begin, end = (8 + length + offset for offset in t["data_offsets"])
            tensors[name] = t["shape"], floats(raw[begin:end], t["dtype"] == "F32")
    return tensors


def read_gguf(path):
    """name: (shape, slowest first; whether F32; values). Only F32 and BF16."""
    raw, place = path.read_bytes(), 4

    def take(code):
        nonlocal place
        (value,) = struct.unpack_from("<" + code, raw, place)
        place += struct.calcsize("<" + code)
        return value

    def text():
        nonlocal place
        length = take("Q")
        place += length
        return raw[place - length : place].decode()

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            kind, count = take("I"), take("Q")
            return [value(kind) for _ in range(count)]
        return take({4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}[kind])

    take("I")  # version
    tensors, keys = take("Q"), take("Q")
    for _ in range(keys):
        text(), value(take("I"))
    listed = [(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(tensors)]
    data = (place + 31) // 32 * 32
    found = {}
    for name, extents, kind, offset in listed:
        assert kind in (0, 30), (name, kind)
        begin, width = data + offset, 4 if kind == 0 else 2
        found[name] = extents[::-1], kind == 0, floats(raw[begin : begin + width * math.prod(extents)], kind == 0)
    return found


SAME = {"attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
        "attn_q.weight": "self_attn.q_proj.weight", "attn_output.weight": "self_attn.o_proj.weight"}
MLA = {"attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
       "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight"}
KDA = {"attn_k.weight": "self_attn.k_proj.weight", "attn_v.weight": "self_attn.v_proj.weight",
       "ssm_conv1d_q.weight": "self_attn.q_conv1d.weight", "ssm_conv1d_k.weight": "self_attn.k_conv1d.weight",
       "ssm_conv1d_v.weight": "self_attn.v_conv1d.weight", "ssm_f_a.weight": "self_attn.f_a_proj.weight",
       "ssm_f_b.weight": "self_attn.f_b_proj.weight", "ssm_g_a.weight": "self_attn.g_a_proj.weight",
       "ssm_g_b.weight": "self_attn.g_b_proj.weight", "ssm_beta.weight": "self_attn.b_proj.weight",
       "ssm_dt.bias": "self_attn.dt_bias", "ssm_norm.weight": "self_attn.o_norm.weight"}
DENSE = {f"ffn_{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
MOE = {"ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
       "exp_probs_b.bias": "block_sparse_moe.gate.e_score_correction_bias",
       **{f"ffn_{x}_shexp.weight": f"block_sparse_moe.shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")}}
STACKED = {"ffn_gate_exps.weight": "w1", "ffn_up_exps.weight": "w3", "ffn_down_exps.weight": "w2"}


def expected(checkpoint, config):
    """(GGUF name, shape, values, names in the checkpoint) by the rules of the format."""
    def same(ours, theirs):
        return ours, *checkpoint[theirs], [theirs]

    yield same("token_embd.weight", "model.embed_tokens.weight")
    yield same("output_norm.weight", "model.norm.weight")
    yield same("output.weight", "lm_head.weight")
    heads, own, value = (config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        mla = i + 1 in config["linear_attn_config"]["full_attn_layers"]
        dense = i < config["first_k_dense_replace"]
        for a, b in {**SAME, **(MLA if mla else KDA), **(DENSE if dense else MOE)}.items():
            yield same(ours + a, theirs + b)
        if mla:
            name = theirs + "self_attn.kv_b_proj.weight"
            (_, rank), w = checkpoint[name]
            row = lambda head, d: w[(head * (own + value) + d) * rank : (head * (own + value) + d + 1) * rank]
            keys = [x for h in range(heads) for column in zip(*(row(h, d) for d in range(own))) for x in column]
            values = [x for h in range(heads) for d in range(value) for x in row(h, own + d)]
            yield ours + "attn_k_b.weight", [heads, rank, own], keys, [name]
            yield ours + "attn_v_b.weight", [heads, value, rank], values, [name]
        else:
            name = theirs + "self_attn.A_log"
            yield ours + "ssm_a", [heads, 1], [-math.exp(x) for x in checkpoint[name][1]], [name]
        for a, b in {} if dense else STACKED.items():
            names = [f"{theirs}block_sparse_moe.experts.{e}.{b}.weight" for e in range(config["num_experts"])]
            yield (ours + a, [len(names), *checkpoint[names[0]][0]],
                   [x for name in names for x in checkpoint[name][1]], names)


class Convert(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.hf = self.folder / "hf"
        subprocess.run([sys.executable, MAKE, self.hf, "--tiny", "--layers", "5", "--experts", "8", "--shard-gib",
                        "0.0002"], check=True)

    def test_bf16_holds_exactly_the_values_of_the_checkpoint(self):
        self.assertGreater(len(list(self.hf.glob("*.safetensors"))), 2)
        keel("convert", self.hf, self.folder / "out.gguf", "--type", "bf16")
        checkpoint, made = read_checkpoint(self.hf), read_gguf(self.folder / "out.gguf")
        config = json.loads((self.hf / "config.json").read_text())
        used, checked = set(), set()
        for name, shape, values, sources in expected(checkpoint, config):
            got_shape, wide, got = made[name]
            self.assertEqual([n for n in got_shape if n > 1], [n for n in shape if n > 1], name)
            self.assertEqual(got, array.array("f", values), name)
            as_f32 = len(got_shape) == 1 or name.endswith(("conv1d_q.weight", "conv1d_k.weight", "conv1d_v.weight",
                                                           "ssm_a", "gate_inp.weight"))
            self.assertEqual(wide, as_f32, name)
            used.update(sources)
            checked.add(name)
        self.assertEqual(used, set(checkpoint))
        self.assertEqual(checked, set(made))

    def test_options(self):
        one, three = self.folder / "1.gguf", self.folder / "3.gguf"
        keel("convert", self.hf, one, "--type", "q8_0", "-t", 1)
        keel("convert", self.hf, three, "--type", "q8_0", "-t", 3)
        self.assertEqual(one.read_bytes(), three.read_bytes())
        self.assertIn("exists", keel("convert", self.hf, one, code=1))
        keel("convert", self.hf, one, "--type", "f32", "--tensor-type", "*.attn_q.*=bf16", "--force")
        self.assertEqual({name for name, (_, wide, _) in read_gguf(one).items() if not wide},
                         {f"blk.{i}.attn_q.weight" for i in range(5)})
        keel("convert", self.hf, self.folder / "split.gguf", "--split-size", "300K")
        self.assertGreater(len(list(self.folder.glob("split-*.gguf"))), 2)

    def test_what_is_wrong_is_said(self):
        (self.hf / "model-00002-of-00005.safetensors").unlink()
        self.assertIn("model-00002-of-00005.safetensors", keel("convert", self.hf, self.folder / "no.gguf", code=1))
        self.assertFalse((self.folder / "no.gguf").exists())


if __name__ == "__main__":
    unittest.main()
