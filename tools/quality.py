#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""quality.py BF16.gguf TEXT STUDY_TEXT --keel KEEL [--peer DIR] [--out docs/quality.md]

Measures what quantisation costs: size, perplexity and KL divergence of every type that keel writes, beside the files
of llama-quantize (in DIR), and how much each kind of tensor matters. Both makers' files are evaluated by keel, in
exact precision, so that only the weights differ. Replaces the tables in the document between their markers; without
--out, prints them. TEXT is what is evaluated, STUDY_TEXT another one, for importance matrices and the study of
tensors."""
import argparse
import json
import pathlib
import subprocess
import tempfile

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("model")
options.add_argument("text")
options.add_argument("study_text")
options.add_argument("--keel", required=True)
options.add_argument("--peer", type=pathlib.Path)
options.add_argument("--out", type=pathlib.Path)
options = options.parse_args()

TYPES = {"q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k_m": "Q5_K_M", "q5_1": "Q5_1", "q5_0": "Q5_0", "q4_k_m": "Q4_K_M",
         "q4_1": "Q4_1", "q4_0": "Q4_0", "iq4_nl": "IQ4_NL", "iq4_xs": "IQ4_XS", "mxfp4": "MXFP4_MOE",
         "q3_k": "Q3_K_S", "q2_k": "Q2_K"}
KINDS = ["token_embd.weight", "output.weight", "*.attn_q.weight", "*.attn_k.weight", "*.attn_v.weight",
         "*.attn_output.weight", "*.ssm_f_*", "*.ssm_g_*", "*.ssm_beta.weight", "*.attn_kv_a_mqa.weight",
         "*.attn_k_b.weight", "*.attn_v_b.weight", "*.ffn_gate.weight", "*.ffn_up.weight", "*.ffn_down.weight",
         "*.ffn_gate_exps.weight", "*.ffn_up_exps.weight", "*.ffn_down_exps.weight", "*.ffn_gate_shexp.weight",
         "*.ffn_up_shexp.weight", "*.ffn_down_shexp.weight"]
scratch = tempfile.TemporaryDirectory()
made = pathlib.Path(scratch.name, "made.gguf")


def run(*command):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def keel(*command):
    return run(options.keel, *command)


def perplexity(model, *more):
    return json.loads(keel("perplexity", "-m", model, "--precision", "exact", "--json", *more))


def base_of(text, name):
    path = pathlib.Path(scratch.name, name)
    return path, perplexity(options.model, "-f", text, "--save-logits", path)


def types():
    base, whole = base_of(options.text, "base")
    size = pathlib.Path(options.model).stat().st_size
    yield "| type | made by | MB | perplexity | KL mean | KL median | KL 99 % | same top token |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    yield f"| bf16 | | {size / 1e6:.2f} | {whole['perplexity']:.3f} ± {whole['perplexity_error']:.3f} | | | | |"
    importance = pathlib.Path(scratch.name, "importance")
    keel("imatrix", "-m", options.model, "-f", options.study_text, importance)
    rows = [(ours, ours, theirs, []) for ours, theirs in TYPES.items()]
    rows.append(("q4_k_m, imatrix", "q4_k_m", "Q4_K_M", ["--imatrix", importance]))
    for name, ours, theirs, more in rows:
        makers = {"keel": lambda: keel("quantize", options.model, made, ours, *more, "--force")}
        if options.peer:
            makers["llama.cpp " + theirs] = lambda: run(options.peer / "llama-quantize", *more, options.model, made,
                                                        theirs)
        for maker, make in makers.items():
            make()
            r = perplexity(made, "--kld-base", base)
            yield (f"| {name} | {maker} | {made.stat().st_size / 1e6:.2f} | {r['perplexity']:.3f} "
                   f"| {r['kld_mean']:.5f} ± {r['kld_mean_error']:.5f} | {r['kld_median']:.5f} | {r['kld_99']:.4f} "
                   f"| {100 * r['top1_agreement']:.2f} % |")


def kinds():
    base, _ = base_of(options.study_text, "study")
    whole = pathlib.Path(options.model).stat().st_size
    rows = []
    for kind in KINDS:
        keel("quantize", options.model, made, "bf16", "--tensor-type", kind + "=iq4_nl", "--force")
        millions = (whole - made.stat().st_size) / (16 - 4.5) * 8 / 1e6
        rows.append((kind, millions, perplexity(made, "--kld-base", base)["kld_mean"]))
    yield "| only these in IQ4_NL | million weights | KL mean | per million weights |"
    yield "|---|--:|--:|--:|"
    for kind, millions, kld in sorted(rows, key=lambda row: -row[2] / row[1]):
        yield f"| `{kind}` | {millions:.3f} | {kld:.5f} | {kld / millions:.4f} |"


for name, table in {"types": types, "kinds": kinds}.items():
    text = "\n".join(table())
    if options.out is None:
        print(text + "\n")
        continue
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = options.out.read_text(encoding="utf-8").partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{options.out}: has no place between {begin.strip()} and {end}")
    options.out.write_text(before + begin + text + "\n" + rest[rest.index(end):], encoding="utf-8")
