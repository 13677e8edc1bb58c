#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""make_checkpoint.py FOLDER [--layers N] [--experts N] [--shard-gib G] [--tiny]: random weights as a Hugging Face
checkpoint of Kimi-Linear-48B, with its tensor names, shapes and vocabulary size, to try the converter on something
large; or with shapes of a few hundred KiB in all, to check every value of what it makes."""
import argparse
import base64
import json
import pathlib
import random
import struct

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("folder", type=pathlib.Path)
options.add_argument("--layers", type=int, default=4, help="27 in the released model; every 4th and the last are MLA")
options.add_argument("--experts", type=int, default=256)
options.add_argument("--shard-gib", type=float, default=2)
options.add_argument("--tiny", action="store_true")
options = options.parse_args()

HIDDEN, HEADS, DIM, KERNEL, RANK, OWN, POSITION, VALUE = 2304, 32, 128, 4, 512, 128, 64, 128
DENSE_FF, EXPERT_FF, VOCABULARY, RANKS = 9216, 1024, 163840, 163584
if options.tiny:
    HIDDEN, HEADS, DIM, KERNEL, RANK, OWN, POSITION, VALUE = 64, 3, 16, 4, 32, 24, 8, 16
    DENSE_FF, EXPERT_FF, VOCABULARY, RANKS = 96, 40, 400, 300
CHANNELS = HEADS * DIM
full = [i for i in range(1, options.layers + 1) if i % 4 == 0 or i == options.layers]


def layer(i):
    """(name, shape, type) of a layer's tensors, counted from 0."""
    yield "input_layernorm.weight", [HIDDEN], "BF16"
    if i + 1 in full:
        yield "self_attn.q_proj.weight", [HEADS * (OWN + POSITION), HIDDEN], "BF16"
        yield "self_attn.kv_a_proj_with_mqa.weight", [RANK + POSITION, HIDDEN], "BF16"
        yield "self_attn.kv_a_layernorm.weight", [RANK], "BF16"
        yield "self_attn.kv_b_proj.weight", [HEADS * (OWN + VALUE), RANK], "BF16"
        yield "self_attn.o_proj.weight", [HIDDEN, HEADS * VALUE], "BF16"
    else:
        for x in "qkv":
            yield f"self_attn.{x}_proj.weight", [CHANNELS, HIDDEN], "BF16"
            yield f"self_attn.{x}_conv1d.weight", [CHANNELS, 1, KERNEL], "BF16"
        for x in "fg":
            yield f"self_attn.{x}_a_proj.weight", [DIM, HIDDEN], "BF16"
            yield f"self_attn.{x}_b_proj.weight", [CHANNELS, DIM], "BF16"
        yield "self_attn.b_proj.weight", [HEADS, HIDDEN], "BF16"
        yield "self_attn.A_log", [1, 1, HEADS, 1], "F32"
        yield "self_attn.dt_bias", [CHANNELS], "F32"
        yield "self_attn.o_norm.weight", [DIM], "BF16"
        yield "self_attn.o_proj.weight", [HIDDEN, CHANNELS], "BF16"
    yield "post_attention_layernorm.weight", [HIDDEN], "BF16"
    if i == 0:
        yield "mlp.gate_proj.weight", [DENSE_FF, HIDDEN], "BF16"
        yield "mlp.up_proj.weight", [DENSE_FF, HIDDEN], "BF16"
        yield "mlp.down_proj.weight", [HIDDEN, DENSE_FF], "BF16"
        return
    yield "block_sparse_moe.gate.weight", [options.experts, HIDDEN], "BF16"
    yield "block_sparse_moe.gate.e_score_correction_bias", [options.experts], "F32"
    for e in range(options.experts):
        yield f"block_sparse_moe.experts.{e}.w1.weight", [EXPERT_FF, HIDDEN], "BF16"
        yield f"block_sparse_moe.experts.{e}.w2.weight", [HIDDEN, EXPERT_FF], "BF16"
        yield f"block_sparse_moe.experts.{e}.w3.weight", [EXPERT_FF, HIDDEN], "BF16"
    yield "block_sparse_moe.shared_experts.gate_proj.weight", [EXPERT_FF, HIDDEN], "BF16"
    yield "block_sparse_moe.shared_experts.up_proj.weight", [EXPERT_FF, HIDDEN], "BF16"
    yield "block_sparse_moe.shared_experts.down_proj.weight", [HIDDEN, EXPERT_FF], "BF16"


def tensors():
    yield "model.embed_tokens.weight", [VOCABULARY, HIDDEN], "BF16"
    for i in range(options.layers):
        for name, shape, dtype in layer(i):
            yield f"model.layers.{i}.{name}", shape, dtype
    yield "model.norm.weight", [HIDDEN], "BF16"
    yield "lm_head.weight", [VOCABULARY, HIDDEN], "BF16"


def size(shape, dtype):
    n = 4 if dtype == "F32" else 2
    for extent in shape:
        n *= extent
    return n


def noise(seed):
    """A MiB of numbers between 0.008 and 0.03, of either sign, whether read as bf16 or as f32."""
    block = bytearray(random.Random(seed).randbytes(1 << 20))
    block[1::2] = bytes(block[1::2]).translate(bytes(0xBC if i & 1 else 0x3C for i in range(256)))
    return bytes(block)


options.folder.mkdir(parents=True)
blocks = [noise(i) for i in range(7)]
shards, room = [[]], 0
for tensor in tensors():
    room += size(*tensor[1:])
    if room > options.shard_gib * 2**30 and shards[-1]:
        shards.append([])
        room = size(*tensor[1:])
    shards[-1].append(tensor)
weight_map = {}
for s, shard in enumerate(shards):
    file_name = f"model-{s + 1:05}-of-{len(shards):05}.safetensors"
    header, end = {}, 0
    for name, shape, dtype in shard:
        begin, end = end, end + size(shape, dtype)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        weight_map[name] = file_name
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(options.folder / file_name, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for i in range(0, end, 1 << 20):
            out.write(blocks[(s + (i >> 20)) % len(blocks)][: min(1 << 20, end - i)])
(options.folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
single = [bytes([b]) for b in [*printable, *(b for b in range(256) if b not in printable)]]
pairs = [a + b for a in single for b in single]
words = (single + pairs + [p + s for p in pairs for s in single[:2]])[:RANKS]
(options.folder / "tiktoken.model").write_bytes(
    b"".join(base64.b64encode(w) + b" %d\n" % i for i, w in enumerate(words)))
special = {RANKS: "[BOS]", RANKS + 1: "[EOS]", RANKS + 2: "<|im_end|>", VOCABULARY - 2: "[UNK]", VOCABULARY - 1: "[PAD]"}
(options.folder / "tokenizer_config.json").write_text(json.dumps({
    "added_tokens_decoder": {str(i): {"content": name, "special": True} for i, name in special.items()},
    "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}))
(options.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": RANKS + 2}))
(options.folder / "config.json").write_text(json.dumps({
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "hidden_size": HIDDEN,
    "num_hidden_layers": options.layers, "num_attention_heads": HEADS, "head_dim": 72, "hidden_act": "silu",
    "intermediate_size": DENSE_FF, "moe_intermediate_size": EXPERT_FF, "num_experts": options.experts,
    "num_experts_per_token": min(8, options.experts), "num_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid",
    "routed_scaling_factor": 2.446, "num_expert_group": 1, "topk_group": 1, "kv_lora_rank": RANK, "q_lora_rank": None,
    "qk_nope_head_dim": OWN, "qk_rope_head_dim": POSITION, "v_head_dim": VALUE, "mla_use_nope": True,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": VOCABULARY,
    "model_max_length": 1048576, "linear_attn_config": {
        "full_attn_layers": full, "kda_layers": [i for i in range(1, options.layers + 1) if i not in full],
        "head_dim": DIM, "num_heads": HEADS, "short_conv_kernel_size": KERNEL}}))
