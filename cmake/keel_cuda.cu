// SPDX-License-Identifier: MIT
//
// The one source file of keel::cuda.
#include <keel/backend/cuda/kernels.cuh>
