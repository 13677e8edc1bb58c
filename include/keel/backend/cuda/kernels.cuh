// SPDX-License-Identifier: MIT
//
// All kernels and the functions that start them. Included by exactly one .cu of a program; cmake/keel_cuda.cu is one.
#pragma once

#include <keel/backend/cuda/attention.cuh>
#include <keel/backend/cuda/elementwise.cuh>
#include <keel/backend/cuda/experts.cuh>
#include <keel/backend/cuda/kda_step.cuh>
#include <keel/backend/cuda/matvec.cuh>
#include <keel/backend/cuda/repack.cuh>
