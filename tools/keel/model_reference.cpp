// SPDX-License-Identifier: MIT
#include <keel/backend/reference.hpp>

#include "model_of.hpp"

namespace tool {
backend_code reference_code() { return code_of<keel::reference>(); }
}  // namespace tool
