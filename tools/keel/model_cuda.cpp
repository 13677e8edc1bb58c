// SPDX-License-Identifier: MIT
#ifdef KEEL_WITH_CUDA

#include <keel/backend/cuda.hpp>

#include "model_of.hpp"

namespace tool {
backend_code cuda_code() { return code_of<keel::cuda>(); }
}  // namespace tool

#endif
