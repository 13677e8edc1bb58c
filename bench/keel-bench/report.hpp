// SPDX-License-Identifier: MIT
//
// The results, as a table for people or as data.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runner.hpp"
#include "sessions.hpp"

namespace bench {

/// What was measured on.
struct machine {
    std::string processor, system;
    int threads = 0;
    std::string instruction_set;
    limits most;
};
machine describe_machine(const runner& r, bool with_limits);

/// Several runs of one test.
struct result {
    std::string test;  ///< prefill or decode
    std::int64_t tokens = 0, depth = 0;
    std::vector<double> tokens_per_second = {};  ///< one per repetition
    double bytes_per_token = 0;                  ///< decode only
    std::vector<double> reading = {};  ///< bytes per second that memory gave right before each repetition, if known
    double operations_per_token = 0;

    [[nodiscard]] double spread() const;            ///< standard deviation
    [[nodiscard]] double share_of_reading() const;  ///< median over the repetitions; 0: unknown
};

/// Prints all of it on standard output, as "md", "json" or "csv".
void print(const std::string& format, const options& o, const machine& m, const model& measured, double load_seconds,
           const std::vector<result>& results);
void print(const std::string& format, const options& o, const machine& m, const std::vector<operation>& operations);
void print(const std::string& format, const options& o, const machine& m, const std::vector<comparison>& comparisons);

}  // namespace bench
