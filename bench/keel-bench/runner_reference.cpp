// SPDX-License-Identifier: MIT
#include <keel/backend/reference.hpp>

#include "runner_of.hpp"

namespace bench {
std::unique_ptr<runner> make_reference(const options& o) { return std::make_unique<runner_of<keel::reference>>(o); }
}  // namespace bench
