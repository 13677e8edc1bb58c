// SPDX-License-Identifier: MIT
//
// What the commands that write model files share.
#pragma once

#include <string>
#include <vector>

#include <keel/core/progress.hpp>
#include <keel/model/encode_tensor.hpp>
#include <keel/model/mixture.hpp>

#include "model.hpp"

namespace tool {

/// Spreads jobs over this many threads; 0: as many as the machine runs at once.
keel::parallel_for on_threads(int threads);

keel::progress adapt(const progress& tell);

/// PATTERN=TYPE, as the command line has it. Throws keel::error.
std::vector<keel::tensor_type_override> parse_overrides(const std::vector<std::string>& texts);

/// "size -> paths", on standard output.
void print_written(const std::vector<std::filesystem::path>& paths);

}  // namespace tool
