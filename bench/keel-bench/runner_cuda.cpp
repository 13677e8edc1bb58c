// SPDX-License-Identifier: MIT
#ifdef KEEL_WITH_CUDA

#include <keel/backend/cuda.hpp>

#include "runner_of.hpp"

namespace bench {
std::unique_ptr<runner> make_cuda(const options& o) { return std::make_unique<runner_of<keel::cuda>>(o); }
}  // namespace bench

#endif
