// SPDX-License-Identifier: MIT
#ifdef KEEL_WITH_CUDA

#include <keel/backend/cuda.hpp>

#include "model_of.hpp"

namespace tool {
std::unique_ptr<model> load_cuda(const model_options& options) {
    return std::make_unique<model_of<keel::cuda>>(options);
}
}  // namespace tool

#endif
