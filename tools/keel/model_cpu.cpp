// SPDX-License-Identifier: MIT
//
// Compiled once for every instruction set.
#include <keel/backend/cpu.hpp>

#include "model_of.hpp"

namespace tool::KEEL_ISA {
backend_code cpu_code() { return code_of<keel::cpu>(); }
}  // namespace tool::KEEL_ISA
