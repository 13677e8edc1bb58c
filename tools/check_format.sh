#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# check_format.sh CLANG_FORMAT FILE...: shows what clang-format would change, and fails if that is anything. Not its
# --dry-run, because version 14 finds fault there with the comment that closes "namespace keel::inline KEEL_ABI".
set -u
formatter=$1
shift
status=0
for file; do
    "$formatter" "$file" | diff -u --label "$file" --label "$file, formatted" "$file" - || status=1
done
exit $status
