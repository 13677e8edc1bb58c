// SPDX-License-Identifier: MIT
//
// From the argument structs of concept.hpp to those of launch.hpp. For the host compiler.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <span>
#include <string_view>

#include <cuda_runtime_api.h>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cuda/launch.hpp>
#include <keel/backend/cuda/memory.hpp>
#include <keel/backend/cuda/upload.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// What the classes that start kernels have in common.
class cuda_arguments {
protected:
    /// Throws errc::capacity for what kernels cannot count.
    static int number(index n) {
        if (n > std::numeric_limits<int>::max())
            throw error(errc::capacity, "batch", "too large for the GPU's kernels");
        return static_cast<int>(n);
    }

    static cuda_launch::memory plain(const memory_layout& l) {
        return {number(l.heads),      number(l.head_dim),     number(l.taps),
                number(l.mla_layers), number(l.latent_width), l.cache == dtype::f16 ? 1 : 0,
                l.layer_floats()};
    }

    /// Rows of the longest segment.
    static index longest_of(std::span<const segment> segments) {
        index longest = 0;
        for (const segment& s : segments) longest = std::max(longest, s.rows);
        return longest;
    }

    static cuda_launch::activation_rows rows(view<float, 2> x) { return {x.data, x.stride[0]}; }

    /// Room for what lies before the tiles of `parts` convolutions of n rows, if there is more than one tile.
    static float* conv_edges(arena& workspace, index longest, index n, index parts, const memory_layout& layout) {
        if (longest <= cuda_launch::short_conv_tile) return nullptr;
        return workspace.take<float>(parts * cuda_launch::short_conv_edges(number(n)), layout.taps, layout.channels())
            .data;
    }

    /// Throws what starting an operation's kernels returned.
    static void call(std::string_view operation, cudaError_t result) {
        if (result == cudaErrorInvalidValue || result == cudaErrorNotSupported) {
            cudaGetLastError();
            throw error(errc::unsupported, operation, "the GPU's kernels do not serve these shapes");
        }
        detail::check(result, operation);
    }

    /// Calls run(list, count) for the products, as many at a time as kernels take.
    template <class Run>
    static void for_each_list(std::initializer_list<linear<cuda_matrix>> products, Run&& run) {
        cuda_launch::product list[cuda_launch::matvec_args::most];
        for (auto p = products.begin(); p != products.end();) {
            int count = 0;
            for (; p != products.end() && count < cuda_launch::matvec_args::most; ++p) {
                list[count++] = {p->weight.on_device, p->out.data, p->out.stride[0], 0, p->accumulate ? 1 : 0};
            }
            run(list, count);
        }
    }

    /// One gated feed-forward network.
    static cuda_launch::networks network(const swiglu_args<cuda_matrix>& a) {
        cuda_launch::networks to;
        to.x = a.x.data;
        to.x_row = a.x.stride[0];
        to.rows = number(a.x.extent[0]);
        to.gate = a.gate.on_device;
        to.up = a.up.on_device;
        to.down = a.down.on_device;
        to.out = a.out.data;
        to.out_row = a.out.stride[0];
        to.accumulate = a.accumulate ? 1 : 0;
        return to;
    }

    /// The chosen ones of many.
    static cuda_launch::networks chosen_networks(const swiglu_args<cuda_matrix>& a, view<const std::int32_t, 2> chosen,
                                                 view<const float, 2> weights) {
        cuda_launch::networks to = network(a);
        to.chosen = chosen.data;
        to.weights = weights.data;
        to.chosen_row = chosen.stride[0];
        to.weights_row = weights.stride[0];
        to.k = number(chosen.extent[1]);
        return to;
    }
};

}  // namespace keel::inline KEEL_ABI
