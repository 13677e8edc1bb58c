// SPDX-License-Identifier: MIT
#include <keel/backend/cpu.hpp>

#include "model_of.hpp"

namespace tool {
std::unique_ptr<model> load_cpu(const model_options& options) { return std::make_unique<model_of<keel::cpu>>(options); }
}  // namespace tool
