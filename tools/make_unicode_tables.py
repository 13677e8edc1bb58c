#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes include/keel/text/unicode_tables.hpp from the Unicode character database.

    tools/make_unicode_tables.py UCD_DIR > include/keel/text/unicode_tables.hpp

UCD_DIR holds UnicodeData.txt, Scripts.txt and PropList.txt, for example /usr/share/unicode of Debian's package
unicode-data. The committed table is of version 15.0.0.
"""
import re
import sys
from pathlib import Path

CODE_POINTS = 0x110000
UPPER, LOWER, CASELESS, MARK, NUMBER, WHITE_SPACE, HAN = (1 << bit for bit in range(7))
BIT_OF_CATEGORY = {
    "Lu": UPPER, "Lt": UPPER, "Ll": LOWER, "Lm": CASELESS, "Lo": CASELESS,
    "Mn": MARK, "Mc": MARK, "Me": MARK, "Nd": NUMBER, "Nl": NUMBER, "No": NUMBER,
}
PER_LINE = 9


def categories(path):
    """(first, last, category) of each line; blocks such as CJK are written as a First and a Last line."""
    first = None
    for line in path.read_text().splitlines():
        code, name, category = line.split(";")[:3]
        if name.endswith(", First>"):
            first = int(code, 16)
            continue
        yield (int(code, 16) if first is None else first), int(code, 16), category
        first = None


def members(path, wanted):
    """(first, last) of each line of a property file whose value is `wanted`."""
    line_form = re.compile(r"([0-9A-F]+)(?:\.\.([0-9A-F]+))?\s*;\s*(\w+)")
    for line in path.read_text().splitlines():
        match = line_form.match(line)
        if match and match[3] == wanted:
            yield int(match[1], 16), int(match[2] or match[1], 16)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    ucd = Path(sys.argv[1])
    version = re.search(r"-(\d+\.\d+\.\d+)\.txt", (ucd / "Scripts.txt").read_text())[1]

    bits = bytearray(CODE_POINTS)

    def mark(first, last, bit):
        for code in range(first, last + 1):
            bits[code] |= bit

    for first, last, category in categories(ucd / "UnicodeData.txt"):
        mark(first, last, BIT_OF_CATEGORY.get(category, 0))
    for first, last in members(ucd / "Scripts.txt", "Han"):
        mark(first, last, HAN)
    for first, last in members(ucd / "PropList.txt", "White_Space"):
        mark(first, last, WHITE_SPACE)

    starts = [code for code in range(CODE_POINTS) if code == 0 or bits[code] != bits[code - 1]]
    entries = [f"0x{code << 8 | bits[code]:08X}" for code in starts]
    lines = [", ".join(entries[i:i + PER_LINE]) for i in range(0, len(entries), PER_LINE)]
    print(f"""\
// SPDX-License-Identifier: MIT
//
// Written by tools/make_unicode_tables.py from Unicode {version}; do not edit.
#pragma once

#include <cstdint>

#include <keel/core/compiler.hpp>

namespace keel::inline KEEL_ABI {{
namespace detail {{

/// Ranges of equal properties, each up to the next one's start: first code point << 8 | properties (the bits of
/// unicode_properties).
inline constexpr std::uint32_t unicode_ranges[] = {{""")
    for line in lines:
        print(f"    {line},")
    print("""\
};

}  // namespace detail
}  // namespace keel::inline KEEL_ABI""")


main()
