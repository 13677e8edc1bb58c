#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes the token ids of assorted texts as tiktoken computes them with the vendor's pattern (needs `pip install tiktoken`).

    tools/make_tokenizer_cases.py tests/data/tokenizer/demo.tiktoken > tests/data/tokenizer/cases.json
"""
import base64
import json
import random
import sys
import unicodedata

import tiktoken

UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join([
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+" + CONTRACTION,
    r"[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*" + CONTRACTION,
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])

WRITTEN = [
    "", " ", "\n", "a", "the", "Hello world", "Once upon a time there was a princess who lived in a castle by the sea.",
    "\"Elementary, my dear Watson,\" said Holmes; \"you've seen it all, but you don't observe.\"",
    "It was the best of times,\r\n\r\n    it was the worst of times ...   \n\n\tit was 1859.  ",
    "DON'T they'll've I'D we're o'clock rock'n'roll it\u2019s",
    "for (int i = 0; i < 10; ++i) {\n    total_sum += values[i] * 0x1F;  // HTTPRequest::parseJSON\n}\n",
    "def f(x: list[int]) -> None:\n\tprint(f\"{x!r:>10}\")\n", "<html><body class=\"a\">&nbsp;</body></html>", "3.14159265 1,234,567 1/2 \u00bd \u2167 \u0663\u0664",
    "\u4f60\u597d\u4e16\u754c\uff0c\u6211\u5728Moonshot\u5de5\u4f5c\u3002\u4eba\u3005\u306f\u3007\u4e00\u4e8c", "\u6771\u4eac\u30bf\u30ef\u30fc\u306b\u884c\u304d\u307e\u3057\u305fABC",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4.", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u043b\u043a\u0430ABC", "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0650\u0633\u0652\u0645\u0650", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01", "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "na\u00efve fa\u00e7ade Stra\u00dfe \u0132ssel", "N\u0303AN\u0303O e\u0301te\u0301", "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2603\ufe0f \u2192\u2260\u221e",
    "\x00\x01\x7f\u0080\u0085\u00a0\u00ad\u200b\u2028\u3000\ufeff\ufffd", "<|im_end|> [EOS] <think>",
]
RUNS = [[["=", 1000]], [["a", 1000]], [[" ", 300], ["x", 1]], [["\n", 200], [" ", 100]], [["7", 100]], [["ab", 500]],
        [["\u4e2d", 200]], [["\U0001f600", 100]], [["the", 400]], [["Aa", 300]], [["\u3042", 100], ["Z", 100]]]


def random_texts():
    """Strings of words and characters of every kind that make neighbours which no one writes."""
    rng = random.Random(20230912)
    words = ("the of and princess Holmes castle THE McDonald 's 't 'LL don't 12 3456 ... -- _ ( ) {} \n \r\n \t   ' \" "
             "\u4e2d\u6587 \u3005 \u3007 \u30ab\u30bf\u30ab\u30ca \u30fc \u0661\u0662 \u01c5 \u017f \u0301 \u00e9 \u2160 \u20ac \U0001f600").split(" ") + [" ", "  "]
    assigned = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    for _ in range(150):
        yield "".join(rng.choice(words) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 12)))
    for _ in range(60):
        yield "".join(rng.choice(assigned) for _ in range(rng.randint(1, 8)))
    yield "".join(rng.choice("etaoinshrdlu") for _ in range(3000))


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(sys.argv[1], "rb") as file:
        ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in file}
    encoding = tiktoken.Encoding("demo", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    cases = [{"text": text, "ids": encoding.encode_ordinary(text)} for text in WRITTEN + list(random_texts())]
    for runs in RUNS:
        text = "".join(part * count for part, count in runs)
        cases.append({"runs": runs, "ids": encoding.encode_ordinary(text)})
    print("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]")


main()
