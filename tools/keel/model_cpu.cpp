// SPDX-License-Identifier: MIT
//
// Compiled once for every instruction set.
#include <keel/backend/cpu.hpp>

#include "model_of.hpp"

namespace tool::KEEL_ISA {
std::unique_ptr<model> load_cpu(const model_options& options) { return std::make_unique<model_of<keel::cpu>>(options); }
}  // namespace tool::KEEL_ISA
