// SPDX-License-Identifier: MIT
//
// How cuda.hpp comes to the kernels for many rows (launch_prefill.hpp): their arguments, and their room in the
// workspace. For the host compiler.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <span>

#include <cuda_runtime_api.h>

#include <keel/backend/concept.hpp>
#include <keel/backend/cuda/arguments.hpp>
#include <keel/backend/cuda/launch_prefill.hpp>
#include <keel/backend/cuda/upload.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// Operations of many rows on tensor cores, with activations rounded to halves. Made for one call.
class cuda_prefill : cuda_arguments {
public:
    /// From so many rows on, products are those of matrices: measured.
    static constexpr index rows_from = 8;

    cuda_prefill(arena& workspace, cudaStream_t stream) : workspace_(workspace), stream_(stream) {}

    /// Whether products of such rows are computed here.
    static bool serves(view<const float, 2> x) {
        return x.extent[0] >= rows_from && x.extent[1] % 32 == 0 && x.stride[0] % 4 == 0;
    }

    /// What the largest of the operations takes.
    static index scratch_bytes(const workspace_limits& l) {
        const int rows = number(l.rows), columns = number(l.columns);
        const std::size_t most =
            std::max({cuda_launch::products_bytes(rows, columns),
                      cuda_launch::products_bytes(number(l.rows * l.heads), number(std::max(l.latent_rank, l.mla_key))),
                      network_bytes(rows, number(l.chosen), number(l.experts), columns, number(l.expert_ff)),
                      network_bytes(rows, 1, 0, columns, columns), chunk_bytes(l.rows, l.heads, l.head_dim),
                      cuda_launch::expanded_attend_bytes(rows, positions_at_once(l.context), number(l.heads),
                                                         number(l.latent_width), number(l.latent_rank),
                                                         number(l.mla_key), number(l.mla_value))});
        return static_cast<index>(most);
    }

    /// Products with x, or with rms_norm(x) if there is a weight for that.
    void multiply(view<const float, 2> x, std::initializer_list<linear<cuda_matrix>> products,
                  cuda_launch::input_norm norm = {}) {
        const arena::scope scope(workspace_);
        cuda_launch::products_args a{};
        a.x = x.data;
        a.x_row = x.stride[0];
        a.rows = number(x.extent[0]);
        a.columns = number(x.extent[1]);
        a.norm = norm;
        a.workspace = take(cuda_launch::products_bytes(a.rows, a.columns));
        for_each_list(products, [&](const cuda_launch::product* list, int count) {
            std::copy_n(list, count, a.list);
            a.count = count;
            call("matmul", cuda_launch::products(a, stream_));
        });
    }

    /// Whether one small matrix per head is multiplied here: with heads side by side in the output.
    static bool serves_heads(const matmul_heads_args<cuda_matrix>& a) {
        return a.x.extent[0] >= rows_from && a.x.extent[2] % 32 == 0 && a.x.stride[0] % 4 == 0 &&
               a.x.stride[1] % 4 == 0 && a.out.stride[0] == a.out.extent[1] * a.out.stride[1] &&
               a.weight.on_device.type != cuda_launch::layout::f32;
    }
    void multiply_heads(const matmul_heads_args<cuda_matrix>& a) {
        const arena::scope scope(workspace_);
        auto to = per_head<cuda_launch::products_args>(a);
        to.count = 1;
        to.workspace = take(cuda_launch::products_bytes(to.rows * to.heads, to.columns));
        call("matmul_heads", cuda_launch::products(to, stream_));
    }

    /// In two parts where activations take two planes: so the workspace need not be larger for these.
    void feed_forward(const cuda_launch::feed_forward_args& of) {
        const int planes = planes_of(of), part = (of.rows + planes - 1) / planes;
        for (int first = 0; first < of.rows; first += part) {
            const arena::scope scope(workspace_);
            cuda_launch::feed_forward_args now = of;
            now.rows = std::min(part, of.rows - first);
            now.x += first * of.x_row;
            now.out += first * of.out_row;
            if (of.chosen != nullptr) now.chosen += first * of.chosen_row, now.weights += first * of.weights_row;
            const int experts = of.chosen != nullptr ? of.gate.count : 0, hidden = of.gate.columns;
            now.workspace =
                take(std::max(cuda_launch::feed_forward_bytes(now.rows, of.k, experts, hidden, of.gate.rows, planes),
                              cuda_launch::feed_forward_bytes(now.rows, 1, 0, hidden, of.shared_gate.rows, planes)));
            call("experts", cuda_launch::feed_forward(now, stream_));
        }
    }

    /// `segments` are those of the arguments, on the device.
    void kda_chunk(const kda_args& a, const cuda_launch::segment* segments) {
        const arena::scope scope(workspace_);
        const std::size_t bytes = chunk_bytes(rows_of(a.segments).count, a.layout.heads, a.layout.head_dim);
        call("kda_chunk", cuda_launch::kda_chunk({strided(a.q),
                                                  strided(a.k),
                                                  strided(a.v),
                                                  strided(a.log_decay),
                                                  {a.beta.data, a.beta.stride[0], 1},
                                                  strided(a.out),
                                                  segments,
                                                  number(std::ssize(a.segments)),
                                                  number(longest_of(a.segments)),
                                                  number(a.layer),
                                                  plain(a.layout),
                                                  take(bytes),
                                                  bytes},
                                                 stream_));
    }

    /// `segments` are those of the arguments, in host memory with their block tables on the device.
    void expanded_attend(const expanded_attend_args<cuda_matrix>& a, const cuda_launch::segment* segments) {
        const arena::scope scope(workspace_);
        const cuda_launch::matrix &key = a.key_up.on_device, &value = a.value_up.on_device;
        const auto [first, count] = rows_of(a.segments);
        index length = 0;
        for (const segment& s : a.segments) length = std::max(length, s.position + s.rows);
        const std::size_t bytes = cuda_launch::expanded_attend_bytes(
            number(first + count),  // the kernels count from the batch's first row
            positions_at_once(length), number(a.q.extent[1]), number(a.layout.latent_width), key.rows,
            number(a.q.extent[2]), value.rows);
        call("expanded_attend", cuda_launch::expanded_attend({strided(a.q), strided(a.out), key, value, a.scale,
                                                              segments, number(std::ssize(a.segments)), number(a.layer),
                                                              plain(a.layout), take(bytes), bytes},
                                                             stream_));
    }

private:
    static int planes_of(const cuda_launch::feed_forward_args& n) {
        const auto plain = [](const cuda_launch::matrix& m) {
            return m.type == cuda_launch::layout::f16 || m.type == cuda_launch::layout::bf16;
        };
        return plain(n.gate) || plain(n.down) || plain(n.shared_gate) || plain(n.shared_down) ? 2 : 1;
    }
    static std::size_t network_bytes(int rows, int k, int experts, int hidden, int width) {
        return std::max(cuda_launch::feed_forward_bytes(rows, k, experts, hidden, width, 1),
                        cuda_launch::feed_forward_bytes((rows + 1) / 2, k, experts, hidden, width, 2));
    }

    /// Workspace of kda_chunk for `rows` rows in segments of 32 or more.
    static std::size_t chunk_bytes(index rows, index heads, index head_dim) {
        const int h = number(heads), d = number(head_dim);
        return std::max(cuda_launch::kda_chunk_bytes(1, h, d, number(std::max<index>(rows, 32))),
                        cuda_launch::kda_chunk_bytes(number(std::max<index>(rows / 32, 1)), h, d, 32));
    }

    /// How many positions expanded_attend expands to keys and values at once.
    static int positions_at_once(index length) { return number(std::clamp<index>(length, 256, 4096)); }

    template <class T>
    static cuda_launch::activations<T> strided(const view<T, 3>& v) {
        return {v.data, v.stride[0], v.stride[1]};
    }

    void* take(std::size_t bytes) { return workspace_.take<std::byte>(static_cast<index>(bytes)).data; }

    arena& workspace_;
    cudaStream_t stream_;
};

}  // namespace keel::inline KEEL_ABI
