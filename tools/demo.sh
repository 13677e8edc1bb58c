#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# demo.sh [PROMPT]: builds keel, after installing what is missing, and lets the demonstration model inside it continue
# the prompt.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/setup.sh

cmake --preset release >/dev/null
cmake --build --preset release --parallel "$jobs" --target keel_tool
exec build/release/bin/keel generate -p "${1:-Once upon a time}"
