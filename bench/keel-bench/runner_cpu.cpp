// SPDX-License-Identifier: MIT
//
// Compiled once for every instruction set.
#include <keel/backend/cpu.hpp>

#include "runner_of.hpp"

namespace bench::KEEL_ISA {
std::unique_ptr<runner> make_cpu(const options& o) { return std::make_unique<runner_of<keel::cpu>>(o); }
}  // namespace bench::KEEL_ISA
