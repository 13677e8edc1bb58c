// SPDX-License-Identifier: MIT
//
// A KDA layer behind its first products. Between two products everything belongs to one head: it is done sixteen tokens
// at a time, which stay in the first cache from the convolution to the gated norm. The arithmetic is that of the
// separate operations, and so are the bits.
#pragma once

#include <algorithm>
#include <cstddef>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/convolution.hpp>
#include <keel/backend/cpu/elementwise.hpp>
#include <keel/backend/cpu/kda.hpp>
#include <keel/backend/cpu/matmul.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/backend/fused.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

namespace simd {

/// What a thread needs for the tokens of one head that are worked on together.
struct kda_mix_scratch {
    static index floats_per_thread(index dim, index kernel) {
        return kda_scratch::floats_per_thread(dim) + 3 * kernel * dim + kda_tokens * (5 * dim + 1);
    }

    kda_mix_scratch(float* memory, index dim, index kernel)
        : recurrence(memory, dim),
          taps{memory + kda_scratch::floats_per_thread(dim), 3, kernel, dim},
          mixed{taps.data + taps.size(), 3, kda_tokens, dim},
          log_decay{mixed.data + mixed.size(), kda_tokens, dim},
          out{log_decay.data + log_decay.size(), kda_tokens, dim},
          beta{out.data + out.size(), kda_tokens, 1} {}

    [[nodiscard]] kda_part part(index tokens) const {
        return kda_part{mixed[0], mixed[1], mixed[2], log_decay, beta, out}.rows(0, tokens);
    }

    kda_scratch recurrence;
    view<float, 3> taps;       // (3 for q, k, v; K; D)
    view<float, 3> mixed;      // (3 for q, k, v; tokens; D), behind the convolution
    view<float, 2> log_decay;  // (tokens, D)
    view<float, 2> out;        // (tokens, D)
    view<float, 2> beta;       // (tokens, 1)
};

/// Asks for n floats, into the second cache. Always inline: g++ takes a function that does only this for one without
/// effect, and drops the call.
[[gnu::always_inline]] inline void prefetch_row(const float* x, index n) {
    for (index i = 0; i < n; i += 16) __builtin_prefetch(x + i, 0, 2);
}

/// One head of one segment. `decay` (n, C) is what kda_gates() begins with, `gate` (n, C) the gate before its sigmoid,
/// whose place the gated norm takes.
template <index Kernel, class Matrix>
void kda_mix_head(const kda_mix_args<Matrix>& a, const segment& s, index head, view<const float, 2> decay,
                  view<float, 2> gate, bool chunked, const kda_mix_scratch& scratch) {
    const auto recur = [&](const kda_part& part, const kda_state& state) {
        const flush_denormals flush;  // here alone, as kda_step() and kda_chunk() do
        chunked ? kda_chunk_part(part, state, scratch.recurrence) : kda_step_part(part, state, scratch.recurrence);
    };
    const index dim = a.layout.head_dim, channel = head * dim;
    const view<const float, 2> inputs[] = {a.q, a.k, a.v}, taps[] = {a.taps_q, a.taps_k, a.taps_v};
    const auto history = a.layout.history(s.recurrent, a.layer);
    for (index i = 0; i < 3; ++i) order_taps<Kernel>(taps[i].rows(channel, dim), scratch.taps[i]);

    const auto state = a.layout.state(s.recurrent, a.layer)[head];
    for_tokens(s.rows, state, scratch.recurrence.state, [&](index first, index count, const kda_state& some) {
        const index row = s.first_row + first;
        for (index i = 0; i < 3; ++i) {
            convolve<Kernel>(inputs[i].rows(row, count).columns(channel, dim), history[i].columns(channel, dim),
                             scratch.taps[i], scratch.mixed[i]);
        }
        for (index t = 0; t < count; ++t) {
            l2_norm_row(scratch.mixed[0][t].data, a.epsilon, dim);
            l2_norm_row(scratch.mixed[1][t].data, a.epsilon, dim);
            log_decay_row(&decay(row + t, channel), a.dt_bias.data + channel, a.a[head], dim,
                          scratch.log_decay[t].data);
            scratch.beta(t, 0) = a.beta(row + t, head);
            // Rows are so far apart that the processor does not foresee them.
            if (first + kda_tokens + t < s.rows) {
                for (const auto& rows : {a.q, a.k, a.v, decay, view<const float, 2>(gate)}) {
                    prefetch_row(&rows(row + kda_tokens + t, channel), dim);
                }
            }
        }
        sigmoid_row(scratch.beta.data, count);
        recur(scratch.part(count), some);
        for (index t = 0; t < count; ++t) {
            float* const to = &gate(row + t, channel);
            gated_norm_row(scratch.out[t].data, a.out_norm.data, to, a.epsilon, dim, to);
        }
    });
}

}  // namespace simd

/// Workspace that kda_mix() takes.
inline index kda_mix_scratch_bytes(const workspace_limits& limits, int threads) {
    constexpr index size = sizeof(float);
    const index channels = limits.heads * limits.head_dim;
    const index heads = threads * simd::kda_mix_scratch::floats_per_thread(limits.head_dim, limits.taps + 1) * size;
    return 2 * (limits.rows * channels * size + arena::alignment) +
           std::max({heads + arena::alignment, matmul_scratch_bytes(limits.rows, 1, limits.head_dim, threads),
                     matmul_scratch_bytes(limits.rows, 1, channels, threads)});
}

/// Segments of `prefill_from` rows and more take the chunked form. Each head is one thread's work.
template <class Matrix>
void kda_mix(const kda_mix_args<Matrix>& a, index prefill_from, precision wanted, thread_pool& pool, arena& workspace) {
    const index dim = a.layout.head_dim, kernel = a.layout.taps + 1;
    const arena::scope scope(workspace);
    const auto decay = workspace.take<float>(a.x.extent[0], a.layout.channels());
    const auto gate = workspace.take<float>(a.x.extent[0], a.layout.channels());
    matmul<Matrix>(a.decay_low, {{a.decay_up, decay}}, wanted, pool, workspace);
    matmul<Matrix>(a.gate_low, {{a.gate_up, gate}}, wanted, pool, workspace);
    {
        const arena::scope heads(workspace);
        const auto memory = workspace.take<float>(pool.size(), simd::kda_mix_scratch::floats_per_thread(dim, kernel));
        simd::visit_kernel(kernel, [&]<index Kernel>() {
            simd::for_heads(a.layout, a.segments, 1, pool, [&](int thread, const segment& s, index head, row_range) {
                const simd::kda_mix_scratch scratch(memory[thread].data, dim, kernel);
                simd::kda_mix_head<Kernel>(a, s, head, decay, gate, s.rows >= prefill_from, scratch);
            });
        });
    }
    matmul<Matrix>(gate, {{a.out, a.x, true}}, wanted, pool, workspace);
}

}  // namespace keel::inline KEEL_ABI
