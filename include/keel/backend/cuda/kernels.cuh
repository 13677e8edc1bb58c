// SPDX-License-Identifier: MIT
//
// All kernels and the functions that start them. Included by exactly one .cu of a program; cmake/keel_cuda.cu is one.
#pragma once

#include <keel/backend/cuda/attend_halves.cuh>
#include <keel/backend/cuda/attention.cuh>
#include <keel/backend/cuda/convolution.cuh>
#include <keel/backend/cuda/elementwise.cuh>
#include <keel/backend/cuda/experts.cuh>
#include <keel/backend/cuda/feed_forward.cuh>
#include <keel/backend/cuda/flash.cuh>
#include <keel/backend/cuda/kda_chunk.cuh>
#include <keel/backend/cuda/kda_mix.cuh>
#include <keel/backend/cuda/kda_step.cuh>
#include <keel/backend/cuda/latent_mix.cuh>
#include <keel/backend/cuda/matvec.cuh>
#include <keel/backend/cuda/products.cuh>
#include <keel/backend/cuda/repack.cuh>
#include <keel/backend/cuda/route.cuh>
#include <keel/backend/cuda/shortlist.cuh>

namespace keel::cuda_launch {

/// The functions of launch_prefill.hpp are inline where they are defined; naming them here makes them part of this
/// object.
extern const void* const prefill_functions[] = {
    reinterpret_cast<const void*>(&products_bytes),        reinterpret_cast<const void*>(&products),
    reinterpret_cast<const void*>(&feed_forward_bytes),    reinterpret_cast<const void*>(&feed_forward),
    reinterpret_cast<const void*>(&kda_chunk_bytes),       reinterpret_cast<const void*>(&kda_chunk),
    reinterpret_cast<const void*>(&expanded_attend_bytes), reinterpret_cast<const void*>(&expanded_attend),
};

}  // namespace keel::cuda_launch
