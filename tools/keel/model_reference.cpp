// SPDX-License-Identifier: MIT
#include <keel/backend/reference.hpp>

#include "model_of.hpp"

namespace tool {
std::unique_ptr<model> load_reference(const model_options& options) {
    return std::make_unique<model_of<keel::reference>>(options);
}
}  // namespace tool
