#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tools/check_includes.py accepts what the table allows and names the header in everything else."""
import pathlib
import subprocess
import sys
import tempfile

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "tools" / "check_includes.py"
HEAD = "// SPDX-License-Identifier: MIT\n#pragma once\n"

ALLOWED = [
    ("core/view.hpp", "#include <vector>\n#include <keel/version.hpp>\n// #include <keel/keel.hpp> in a comment\n"),
    ("io/gguf.hpp", "#include <sys/mman.h>\n#include <keel/core/view.hpp>\n#include <keel/io/mapped_file.hpp>\n"),
    ("backend/cpu.hpp", "#include <keel/backend/reference.hpp>\n#include <keel/backend/cpu/simd.hpp>\n"),
    ("backend/cpu/simd.hpp", "#include <xsimd/xsimd.hpp>\n"),
    ("backend/cpu/matmul.hpp", "#include <Eigen/Core>\n"),
    ("backend/cuda/kernels.cuh", "#include <cuda_fp16.h>\n#include <keel/backend/cuda/kda.cuh>\n"),
    ("model/kda.hpp", "#include <keel/backend/concept.hpp>\n#include <keel/io/gguf.hpp>\n"),
    ("engine.hpp", "#include <filesystem>\n#include <keel/session.hpp>\n#include <keel/text/tokenizer.hpp>\n"),
    ("keel.hpp", "#include <keel/engine.hpp>\n#include <keel/backend/cpu.hpp>\n"),
]
FORBIDDEN = [
    ("core/view.hpp", "#include <iostream>\n", "<iostream>"),
    ("core/view.hpp", "#  include <regex>\n", "<regex>"),
    ("core/view.hpp", "#include <unistd.h>\n", "<unistd.h>"),
    ("core/view.hpp", "#include <keel/io/gguf.hpp>\n", "<keel/io/gguf.hpp>"),
    ("io/gguf.hpp", "#include <keel/text/tokenizer.hpp>\n", "<keel/text/tokenizer.hpp>"),
    ("text/tokenizer.hpp", "#include <keel/io/gguf.hpp>\n", "<keel/io/gguf.hpp>"),
    ("text/tokenizer.hpp", "#include <nlohmann/json.hpp>\n", "<nlohmann/json.hpp>"),
    ("backend/concept.hpp", "#include <keel/model/config.hpp>\n", "<keel/model/config.hpp>"),
    ("backend/concept.hpp", "#include <keel/backend/reference.hpp>\n", "<keel/backend/reference.hpp>"),
    ("backend/reference.hpp", "#include <keel/backend/cpu/simd.hpp>\n", "<keel/backend/cpu/simd.hpp>"),
    ("backend/cpu.hpp", "#include <keel/backend/cuda.hpp>\n", "<keel/backend/cuda.hpp>"),
    ("backend/cpu/kda.hpp", "#include <xsimd/xsimd.hpp>\n", "<xsimd/xsimd.hpp>"),
    ("backend/cpu/simd.hpp", "#include <Eigen/Core>\n", "<Eigen/Core>"),
    ("backend/cuda/kda.cuh", "#include <xsimd/xsimd.hpp>\n", "<xsimd/xsimd.hpp>"),
    ("backend/cuda.hpp", "#include <keel/model/state.hpp>\n", "<keel/model/state.hpp>"),
    ("model/kda.hpp", "#include <keel/backend/reference.hpp>\n", "<keel/backend/reference.hpp>"),
    ("model/kda.hpp", "#include <cuda_runtime_api.h>\n", "<cuda_runtime_api.h>"),
    ("engine.hpp", "#include <keel/backend/cpu.hpp>\n", "<keel/backend/cpu.hpp>"),
    ("session.hpp", "#include <keel/backend/cuda.hpp>\n", "<keel/backend/cuda.hpp>"),
    ("keel.hpp", "#include <keel/backend/cuda.hpp>\n", "<keel/backend/cuda.hpp>"),
    ("fwd.hpp", '#include "version.hpp"\n', '"version.hpp"'),
    ("utils/misc.hpp", "", "no row in the table"),
]


def check(name, text):
    with tempfile.TemporaryDirectory() as root:
        header = pathlib.Path(root, "include", "keel", name)
        header.parent.mkdir(parents=True)
        header.write_text(text, encoding="utf-8")
        run = subprocess.run([sys.executable, SCRIPT, root], capture_output=True, text=True)
        assert not run.stderr, run.stderr
        return run.returncode, run.stdout


for name, body in ALLOWED:
    status, said = check(name, HEAD + body)
    assert status == 0 and said == "", (name, said)
cases = [(name, HEAD + body, complaint) for name, body, complaint in FORBIDDEN]
cases += [("fwd.hpp", "#pragma once\n", "SPDX"), ("fwd.hpp", HEAD.splitlines()[0] + "\n", "#pragma once")]
for name, text, complaint in cases:
    status, said = check(name, text)
    assert status == 1 and f"include/keel/{name}: " in said and complaint in said, (name, text, said)
print(f"{len(ALLOWED)} headers accepted, {len(cases)} refused")
