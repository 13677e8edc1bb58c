#!/bin/sh
# Everything that needs a GPU, in one go: builds (preset "cuda"), runs the tests of the CUDA backend, the memory checker
# on the small ones, and the benchmarks; a table last. Logs go to $OUT, or build/cuda/logs.
#   tools/test-cuda.sh [FOLDER]   with FOLDER: uses the executables test_cuda and decode_bench found there, and builds
#                                 nothing
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
check() {  # NAME COMMAND...: one line of the table
    name=$1
    shift
    if "$@" >"$logs/$name.log" 2>&1; then result=passed; else result="FAILED, see $logs/$name.log"; failed=1; fi
    rows="$rows$(printf '%-24s %s' "$name" "$result")
"
}
rows=
check operations "$bin/test_cuda" '~[golden]'
check golden "$bin/test_cuda" '[golden]'
for test in "$bin"/cuda_*_test; do
    if [ -x "$test" ]; then check "$(basename "$test")" "$test"; fi
done
if command -v compute-sanitizer >/dev/null; then
    small='norms*,sums*,one small*,convolution*,the router*'
    check memcheck compute-sanitizer --error-exitcode 9 "$bin/test_cuda" "$small"
    check racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$bin/test_cuda" "$small"
fi
"$bin/decode_bench" >"$logs/decode.txt" 2>&1 || failed=1
cat "$logs/decode.txt"
printf '\n%s' "$rows"
exit $failed
