#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds the preset release and runs every test, after installing what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/setup.sh

cmake --preset release
cmake --build --preset release --parallel "$jobs"
ctest --preset release --parallel "$jobs"
