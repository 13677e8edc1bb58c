#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""check_includes.py [SOURCE_DIR]: holds the headers to the table of which folder may include what."""
import pathlib
import re
import sys

WORDS = r"keel/(core/.*|version\.hpp)"
CONCEPT = r"keel/backend/(concept|batch|fused)\.hpp"  # what an op is given and does; no arithmetic
HOST = r"keel/backend/(?!cpu|cuda)[^/]*\.hpp"
ENGINE = WORDS + "|keel/(fwd|engine|session|sampler).hpp|keel/(io|text|model)/.*|" + CONCEPT
CUDA = r"(cuda|cublas|cooperative_groups|mma\.h|nv/|cub/|cute/)\S*"

# The first row that fits a header gives what it may include of keel, and of other libraries.
RULES = [
    (r"keel/version\.hpp", None, None),
    (r"keel/fwd\.hpp", WORDS, None),
    (r"keel/core/", WORDS, None),
    (r"keel/io/", WORDS + "|keel/io/.*", None),
    (r"keel/text/", WORDS + "|keel/text/.*", None),
    (CONCEPT, WORDS + "|" + CONCEPT, None),
    (HOST, WORDS + "|" + HOST, None),
    (r"keel/backend/cpu", WORDS + "|" + HOST + r"|keel/backend/cpu(\.hpp|/.*)", None),
    (r"keel/backend/cuda", WORDS + "|" + CONCEPT + r"|keel/backend/cuda(\.hpp|/.*)", CUDA),
    (r"keel/model/", WORDS + "|keel/(io|model)/.*|" + CONCEPT, None),
    (r"keel/(engine|session|sampler)\.hpp", ENGINE, None),
    (r"keel/keel\.hpp", r"keel/(?!backend/cuda).*", None),
]
ONLY_HERE = {"keel/backend/cpu/simd.hpp": r"xsimd/.*", "keel/backend/cpu/matmul.hpp": r"Eigen/.*"}
THIRD_PARTY = r"(xsimd|Eigen|unsupported|nlohmann|CLI|catch2)/.*|" + CUDA
IN_CORE = r"(?!(iostream|regex|filesystem)$)[a-z_0-9]+"  # standard C++ only, and cheap to include
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.M)


def problems(root):
    for path in sorted(p for p in (root / "include").rglob("*") if p.is_file()):
        name, text = path.relative_to(root / "include").as_posix(), path.read_text(encoding="utf-8")
        if not text.startswith("// SPDX-License-Identifier: MIT\n"):
            yield name, "does not start with its SPDX licence line"
        if not re.search(r"^#pragma once$", text, re.M):
            yield name, "has no #pragma once"
        rule = next((r for r in RULES if re.match(r[0], name)), None)
        if rule is None:
            yield name, "has no row in the table of tools/check_includes.py"
            continue
        for bracket, header in INCLUDE.findall(text):
            if header.startswith("keel/"):
                allowed = rule[1]
            elif re.fullmatch(THIRD_PARTY, header):
                allowed = "|".join(filter(None, (rule[2], ONLY_HERE.get(name))))
            else:
                allowed = IN_CORE if name.startswith("keel/core/") else ".*"
            if bracket == '"' or not re.fullmatch(allowed or "(?!)", header):
                yield name, f"must not include {bracket}{header}{'>' if bracket == '<' else bracket}"


found = list(problems(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
for name, problem in found:
    print(f"include/{name}: {problem}")
sys.exit(1 if found else 0)
