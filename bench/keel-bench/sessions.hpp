// SPDX-License-Identifier: MIT
//
// What it costs to go back in a conversation, to copy it, to take it to disk and back, to decode several together.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runner.hpp"

namespace bench {

/// Something that was measured, beside what it is to be judged by.
struct comparison {
    std::string test;
    double value = 0;
    std::string beside;
    double other = 0;
    std::string unit;
};

/// A conversation of `depth` tokens in turns of 512, 200 of them the user's. `file` is where snapshots go; it is
/// removed.
std::vector<comparison> measure_sessions(const model& model, std::int64_t depth, int repetitions,
                                         const std::string& file);

}  // namespace bench
