#!/bin/sh
# Everything that needs a GPU, in one go: builds (preset "cuda"), runs the tests of the CUDA backend, 1000 runs of its
# kernels that must give the same bits, the memory and race checkers on the small ones, and the benchmarks; a table last.
# Logs go to $OUT, or build/cuda/logs.
#   tools/test-cuda.sh [FOLDER]   with FOLDER: uses the executables found there, and builds nothing; for a machine with
#                                 a GPU and without what a build needs. The tests look for tests/data where they were
#                                 built: keep the path of the source tree.
set -u
cd "$(dirname "$0")/.."
logs=${OUT:-build/cuda/logs}
mkdir -p "$logs"
if [ $# -gt 0 ]; then
    bin=$1
else
    bin=build/cuda/bin
    { cmake --preset cuda && cmake --build --preset cuda -j "$(nproc)"; } >"$logs/build.log" 2>&1 ||
        { tail -20 "$logs/build.log"; exit 1; }
fi
failed=0
rows=
check() {  # NAME COMMAND...: one line of the table
    name=$1
    shift
    start=$(date +%s)
    if "$@" >"$logs/$name.log" 2>&1; then result=passed; else result="FAILED, see $logs/$name.log"; failed=1; fi
    rows="$rows$(printf '%-16s %4d s  %s' "$name" $(($(date +%s) - start)) "$result")
"
}
check operations "$bin/test_cuda" '~[golden]~[long]~[memory]'
check golden "$bin/test_cuda" '[golden]'
check long "$bin/test_cuda" '[long]'
check kernels "$bin/cuda_prefill_test"
check repeated "$bin/cuda_prefill_test" 1000
if command -v compute-sanitizer >/dev/null; then
    small='norms*,sums*,one small*,small products*,a small sparse*,a small MLA*,convolution*,rows are kept*,the router*'
    check memcheck compute-sanitizer --error-exitcode 9 "$bin/test_cuda" "$small"
    check racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$bin/test_cuda" "$small"
    check memcheck-kernels compute-sanitizer --error-exitcode 9 "$bin/cuda_prefill_test" 2
fi
check decode_bench "$bin/decode_bench"
check kernel_bench "$bin/cuda_prefill_bench"
if [ -x "$bin/keel" ]; then  # the executables, on a file of the size of a real model's layers
    model=${TMPDIR:-/tmp}/keel-test-cuda.gguf
    check synth "$bin/keel" synth kimi-linear-48b "$model" --layers 4 --type q4_k_m
    check generate "$bin/keel" generate -m "$model" --backend cuda --ids 1,2,3,4,5 -n 32 --temp 0
    check keel-bench "$bin/keel-bench" -m "$model" --backend cuda -p 512,2048 -n 64 -r 3
    check memory env KEEL_BIG_MODEL="$model" CUDA_MODULE_LOADING=EAGER "$bin/test_cuda" '[memory]'
    for name in generate keel-bench memory; do printf '\n%s:\n' "$name"; tail -12 "$logs/$name.log"; done
    rm -f "$model"
fi
printf '\ndecode_bench:\n'
cat "$logs/decode_bench.log"
printf '\n%s' "$rows"
exit $failed
