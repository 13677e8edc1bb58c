// SPDX-License-Identifier: MIT
//
// What operations of the CUDA backend take from the workspace for themselves.
#pragma once

#include <algorithm>
#include <span>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cuda/arguments.hpp>
#include <keel/backend/cuda/launch.hpp>
#include <keel/backend/cuda/prefill.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/shortlist.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// Sizes of what operations take, and how much of it they split.
class cuda_scratch : protected cuda_arguments {
public:
    /// Activations between the two kernels of a feed-forward network, results of kda_mix and of the router, partial
    /// results of split attention.
    static index scratch_bytes(const workspace_limits& l, const backend_options& options) {
        const index widest = (std::max(l.expert_ff, l.columns) + 31) / 32;  // the shared expert may be the widest
        const index hidden = l.rows * (l.chosen + 1) * widest * cuda_launch::hidden_unit_bytes;
        const index partial = partial_floats(l.heads, l.latent_rank) * static_cast<index>(sizeof(float));
        index many = 0;
        if (options.precision == precision::fast) {
            many = cuda_prefill::scratch_bytes(l) + l.rows * l.columns * static_cast<index>(sizeof(float));
        }
        const index edges = 3 * cuda_launch::short_conv_edges(number(l.rows)) * l.taps * l.heads * l.head_dim *
                            static_cast<index>(sizeof(float));
        const index mixed = l.rows * l.heads * (std::max(l.head_dim, l.mla_value) + l.head_dim / 32) *
                            static_cast<index>(sizeof(float));
        const index routed = l.rows * (l.experts + 4 * l.chosen + l.columns / 2) * static_cast<index>(sizeof(float));
        const index counted = std::min(l.rows, shortlist_rows) * cuda_launch::shortlist_parts(number(l.vocabulary)) *
                              (keel::shortlist::bins + 1) * static_cast<index>(sizeof(float));
        return hidden + mixed + edges + routed + partial + many + counted + 16 * arena::alignment;
    }

protected:
    /// Shortlists that are made at once.
    static constexpr index shortlist_rows = 64;

    /// Most blocks of a split attention, for a group of heads.
    static constexpr index attend_blocks = 256;
    static constexpr index exact_splits = 8;

    /// Into how many parts latent_attend cuts the caches of so many rows, at most attend_blocks. With `exact`, that
    /// does not depend on what else is in the batch.
    template <class Device>
    static index splits_of(index rows, const Device& device) {
        if (device.precision() == precision::exact) return exact_splits;
        return std::clamp<index>(device.multiprocessors() / rows, 1, attend_blocks / rows);
    }

    /// (rows, splits, heads, rank + 4), of which rows * splits are at most attend_blocks.
    static index partial_floats(index heads, index rank) { return attend_blocks * heads * (rank + 4); }

    /// Up to how many rows, and positions behind which, latent_mix is worth it.
    static constexpr index mix_rows = 2, short_positions = 192;
    static_assert(short_positions <= memory_layout::block_rows);

    /// Whether the segments are of one row each and end early: passes with such take other kernels.
    static bool are_short(std::span<const segment> segments) {
        return std::ranges::all_of(segments,
                                   [](const segment& s) { return s.rows == 1 && s.position < short_positions; });
    }
};

}  // namespace keel::inline KEEL_ABI
