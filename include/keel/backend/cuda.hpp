// SPDX-License-Identifier: MIT
//
// The backend of one NVIDIA GPU, compute capability 8.0 or later. Compiled by the host compiler, with nothing of CUDA
// but cuda_runtime_api.h; a program that uses it links keel::cuda, which holds the kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cuda/arguments.hpp>
#include <keel/backend/cuda/device_memory.hpp>
#include <keel/backend/cuda/launch.hpp>
#include <keel/backend/cuda/memory.hpp>
#include <keel/backend/cuda/passes.hpp>
#include <keel/backend/cuda/prefill.hpp>
#include <keel/backend/cuda/scratch.hpp>
#include <keel/backend/cuda/upload.hpp>
#include <keel/backend/fused.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/shortlist.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// The whole model on a GPU. Weights stay quantised. With precision::fast, products of quantised weights take
/// activations of 8 bits; everything else is f32 with either precision.
class cuda : public cuda_device_memory, cuda_scratch {
public:
    /// Throws errc::capacity if the device has no room for the workspace.
    cuda(std::shared_ptr<device> shared, index workspace_bytes)
        : cuda_device_memory(std::move(shared), workspace_bytes), table_(on()), recordings_(on()) {}

    using cuda_scratch::scratch_bytes;

    [[nodiscard]] index prefill_from() const {
        return on()->precision() == precision::exact ? std::numeric_limits<index>::max() : 32;
    }

    /// Runs pass(), a function of `b` that enqueues operations and returns where their results lie. The batch is
    /// uploaded once; if it only decodes, the kernels are recorded, and replayed for the next batch of the same shape.
    /// So a pass may depend on nothing but the shape of the batch and what is in device memory.
    template <class Pass>
    auto graph(const batch& b, Pass&& pass) {
        const detail::device_guard here(on()->ordinal());
        if (!table_.upload(b)) recordings_.clear();
        struct done {
            cuda_batch_table& table;
            ~done() { table.forget(); }
        } const at_the_end{table_};
        return recordings_.run(b, are_short(b.segments), pass);
    }

    // Operations.
    void embed(const embed_args<matrix>& a) {
        call("embed", cuda_launch::embed({a.table.on_device, table_.tokens(a.tokens), a.out.data, a.out.stride[0],
                                          number(a.out.extent[0])},
                                         stream()));
    }

    void rms_norm(const rms_norm_args& a) { call("rms_norm", cuda_launch::rms_norm(arguments(a), stream())); }

    void matmul(view<const float, 2> x, std::initializer_list<linear<matrix>> products) {
        if (many(x)) {
            prefill().multiply(x, products);
        } else {
            multiply(input(x), products);
        }
    }

    /// rms_norm and then matmul, for few rows in one kernel.
    void norm_matmul(view<const float, 2> x, view<const float, 1> norm, float epsilon,
                     std::initializer_list<linear<matrix>> products) {
        if (many(x)) {
            prefill().multiply(x, products, {norm.data, epsilon});
            return;
        }
        cuda_launch::matvec_args a = input(x);
        a.before = cuda_launch::prologue::rms_norm;
        a.norm = norm.data;
        a.epsilon = epsilon;
        multiply(a, products);
    }

    void matmul_heads(const matmul_heads_args<matrix>& a) {
        if (on()->precision() == precision::fast && cuda_prefill::serves_heads(a)) {
            prefill().multiply_heads(a);
            return;
        }
        auto to = per_head<cuda_launch::matvec_args>(a);
        to.products = 1;
        to.quantise = quantise(a.x.extent[2]);
        call("matmul_heads", cuda_launch::matvec(to, stream()));
    }

    void short_conv(const short_conv_args& a) {
        const arena::scope scope(workspace());
        const index longest = longest_of(a.segments);
        float* const edges = conv_edges(workspace(), longest, a.x.extent[0], 1, a.layout);
        call("short_conv",
             cuda_launch::short_conv(arguments(a, table_.segments(a.segments), longest, edges), stream()));
    }

    void kda_inputs(const kda_inputs_args& a) {
        const arena::scope scope(workspace());
        const index longest = longest_of(a.segments), n = a.q.extent[0];
        float* const edges = conv_edges(workspace(), longest, n, 3, a.layout);
        call("kda_inputs",
             cuda_launch::kda_inputs(arguments(a, table_.segments(a.segments), longest, edges), stream()));
    }

    void keep(const keep_args& a) {
        index most = 0;
        for (const segment& s : a.segments) {
            if (s.kept != nullptr) most = std::max(most, std::min(s.rows, s.kept_capacity));
        }
        if (most == 0) return;
        call("keep", cuda_launch::keep(arguments(a, table_.segments(a.segments), most), stream()));
    }

    void l2_norm(const l2_norm_args& a) { call("l2_norm", cuda_launch::l2_norm(arguments(a), stream())); }

    void kda_gates(const kda_gates_args& a) { call("kda_gates", cuda_launch::kda_gates(arguments(a), stream())); }

    void kda_step(const kda_args& a) {
        call("kda_step", cuda_launch::kda_step(arguments(a, table_.segments(a.segments)), stream()));
    }

    /// Whether kda_mix is for such a batch: few sequences, token by token. With precision::exact the layer is composed,
    /// so that a replay gives its bits again.
    [[nodiscard]] bool mixes(const batch& rows) const {
        return on()->precision() == precision::fast && rows.rows() < cuda_prefill::rows_from &&
               rows.at_least(prefill_from()).empty();
    }

    void kda_mix(const kda_mix_args<matrix>& a) {
        const arena::scope scope(workspace());
        const index n = a.x.extent[0], slabs = a.layout.head_dim / 32;
        cuda_launch::kda_mix_args mix = arguments(a, table_.segments(a.segments));
        cuda_launch::matvec_args project = take_mixed(n, a.layout.head_dim, a.out, mix);
        const auto squares = workspace().take<float>(n, a.layout.heads * slabs);
        mix.squares = squares.data;
        call("kda_mix", cuda_launch::kda_mix(mix, stream()));
        if (mix.codes == nullptr) project.before = cuda_launch::prologue::head_norm;
        project.squares = squares.data;
        project.epsilon = a.epsilon;
        project.head_dim = number(a.layout.head_dim);
        project.slabs = number(slabs);
        multiply(project, {{a.out, a.x, true}});
    }

    void kda_chunk(const kda_args& a) { prefill().kda_chunk(a, table_.segments(a.segments)); }

    void gated_norm(const gated_norm_args& a) { call("gated_norm", cuda_launch::gated_norm(arguments(a), stream())); }

    /// Whether latent_mix is for such a batch: few sequences, token by token, with little in their caches.
    [[nodiscard]] bool mixes(const latent_mix_args<matrix>& a) const {
        return on()->precision() == precision::fast && std::ssize(a.segments) <= mix_rows && are_short(a.segments) &&
               cuda_launch::serves_latent_mix(arguments(a, nullptr));
    }

    void latent_mix(const latent_mix_args<matrix>& a) {
        const arena::scope scope(workspace());
        cuda_launch::latent_mix_args mix = arguments(a, table_.segments(a.segments));
        const cuda_launch::matvec_args project = take_mixed(a.x.extent[0], a.value_up.on_device.rows, a.out, mix);
        call("latent_mix", cuda_launch::latent_mix(mix, stream()));
        multiply(project, {{a.out, a.x, true}});
    }

    void latent_append(const latent_append_args& a) {
        const index rows = rows_of(a.segments).count;
        const bool split = on()->precision() == precision::fast && longest_of(a.segments) < prefill_from() &&
                           2 * rows <= on()->multiprocessors();
        call("latent_append",
             cuda_launch::latent_append(
                 {a.rows.data, a.rows.stride[0], a.weight.data, table_.segments(a.segments),
                  number(std::ssize(a.segments)), number(rows), number(a.weight.extent[0]), number(a.layer), a.epsilon,
                  plain(a.layout), split ? number(splits_of(rows, *on())) : 0},
                 stream()));
    }

    void latent_attend(const latent_attend_args& a) {
        const arena::scope scope(workspace());
        const index heads = a.q_latent.extent[1], rank = a.q_latent.extent[2];
        const auto [first, count] = rows_of(a.segments);
        const auto partial = workspace().take<float>(partial_floats(heads, rank));
        const index at_once = attend_blocks / exact_splits;
        const index step = on()->precision() == precision::exact ? at_once : attend_blocks;
        for (index r = 0; r < count; r += step) {
            const index rows = std::min(step, count - r);
            cuda_launch::latent_attend_args some = arguments(a, table_.segments(a.segments));
            some.halves = on()->precision() == precision::fast ? 1 : 0;
            some.first_row = number(first + r);
            some.row_count = number(rows);
            some.partial = partial.data;
            some.splits = number(splits_of(rows, *on()));
            call("latent_attend", cuda_launch::latent_attend(some, stream()));
        }
    }

    void expanded_attend(const expanded_attend_args<matrix>& a) {
        prefill().expanded_attend(a, table_.host_segments(a.segments));
    }

    void swiglu(const swiglu_args<matrix>& a) { feed_forward(a.x, {network(a)}); }

    void route(const route_args& a) {
        call("route", cuda_launch::route({a.logits.data, a.logits.stride[0], a.bias.data, a.chosen.data, a.weights.data,
                                          a.chosen.stride[0], a.weights.stride[0], number(a.logits.extent[0]),
                                          number(a.logits.extent[1]), number(a.chosen.extent[1]), a.scale},
                                         stream()));
    }

    void experts(const experts_args<matrix>& a) {
        feed_forward(a.x, {chosen_networks({a.x, a.gate, a.up, a.down, a.out}, a.chosen, a.weights)});
    }

    void moe(const moe_args<matrix>& a) {
        const arena::scope scope(workspace());
        const index n = a.x.extent[0], experts = a.router.on_device.rows;
        const auto logits = workspace().take<float>(n, experts);
        cuda_launch::route_args route = arguments(a, logits);
        if (many(a.x)) {
            const auto chosen = workspace().take<std::int32_t>(n, a.chosen);
            const auto weights = workspace().take<float>(n, a.chosen);
            const auto h = workspace().take<float>(n, a.x.extent[1]);
            rms_norm({a.x, a.norm, a.epsilon, h});
            if (n >= 128 && a.router.on_device.type == cuda_launch::layout::f32) {
                prefill().multiply(h, {{a.router, logits}});
            } else {
                cuda_launch::matvec_args product = router_input(a);
                product.beside = 1;  // the norm of x that the experts take
                multiply(product, {{a.router, logits}});
            }
            route.chosen = chosen.data;
            route.weights = weights.data;
            route.chosen_row = chosen.stride[0];
            route.weights_row = weights.stride[0];
            call("route", cuda_launch::route(route, stream()));
            cuda_launch::feed_forward_args all{chosen_networks({h, a.gate, a.up, a.down, a.x, true}, chosen, weights)};
            take_shared(a, all);
            prefill().feed_forward(all);
            return;
        }
        const bool codes = n > 1 && quantise(a.x.extent[1]) == 1 && is_integer(a.gate) && is_integer(a.up) &&
                           (a.shared_gate == nullptr || (is_integer(*a.shared_gate) && is_integer(*a.shared_up)));
        const index code_bytes = cuda_launch::code_row_bytes(number((a.x.extent[1] + 31) / 32));
        const auto coded = workspace().take<unsigned char>(codes ? n : 0, code_bytes);
        cuda_launch::matvec_args product = router_input(a);
        product.put_codes = codes ? coded.data : nullptr;
        multiply(product, {{a.router, logits}});
        cuda_launch::experts_args to{network({a.x, a.gate, a.up, a.down, a.x, true})};
        to.norm = a.norm.data;
        to.epsilon = a.epsilon;
        to.codes = codes ? coded.data : nullptr;
        to.route = route;
        to.k = number(a.chosen);
        take_shared(a, to);
        experts_of_few(to);
    }

    void add(const add_args& a) { call("add", cuda_launch::add(arguments(a), stream())); }

    void gather(const gather_args& a) {
        call("gather", cuda_launch::gather({a.x.data, a.x.stride[0], table_.wanted(a.rows), a.out.data, a.out.stride[0],
                                            number(a.out.extent[0]), number(a.x.extent[1])},
                                           stream()));
    }

    void scatter(const scatter_args& a) {
        cuda_launch::scatter_args to{a.x.data, a.x.stride[0], {}, 0, number(a.x.extent[1])};
        for (std::size_t done = 0; done < a.rows.size(); done += cuda_launch::scatter_args::most) {
            const auto part = a.rows.subspan(done, std::min<std::size_t>(a.rows.size() - done, to.most));
            std::ranges::copy(part, to.to);
            to.rows = number(std::ssize(part));
            call("scatter", cuda_launch::scatter(to, stream()));
            to.x += std::ssize(part) * to.x_row;
        }
    }

    void shortlist(const shortlist_args& a) {
        const int columns = number(a.logits.extent[1]), parts = cuda_launch::shortlist_parts(columns);
        for (index done = 0, n = 0; done < a.logits.extent[0]; done += n) {
            n = std::min(a.logits.extent[0] - done, shortlist_rows);
            const arena::scope scope(workspace());
            const auto best = workspace().take<float>(n, parts);
            const auto counts = workspace().take<unsigned>(n, parts, keel::shortlist::bins);
            call("shortlist",
                 cuda_launch::shortlist({a.logits[done].data, a.logits.stride[0], number(n), columns,
                                         reinterpret_cast<unsigned char*>(&a.lists[done]), best.data, counts.data},
                                        stream()));
        }
    }

private:
    /// Whether products with these rows are computed on tensor cores.
    [[nodiscard]] bool many(view<const float, 2> x) const {
        return on()->precision() == precision::fast && cuda_prefill::serves(x);
    }
    [[nodiscard]] cuda_prefill prefill() { return {workspace(), stream()}; }

    /// Where operations go, for the calling thread as well: kernels start on its current device.
    [[nodiscard]] cudaStream_t stream() const {
        detail::check(cudaSetDevice(on()->ordinal()), "GPU");
        return recordings_.stream();
    }
    /// Whether kernels multiply these weights with activations of 8 bits.
    static bool is_integer(const matrix& m) { return m.on_device.type > cuda_launch::layout::q8_0; }

    /// Whether activations of that width may be rounded to 8 bits: low-rank gates and decays are not, nor are heads.
    [[nodiscard]] int quantise(index columns) const {
        return on()->precision() == precision::fast && columns > 128 ? 1 : 0;
    }

    [[nodiscard]] cuda_launch::matvec_args input(view<const float, 2> x) const {
        cuda_launch::matvec_args a{};
        a.x = x.data;
        a.x_row = x.stride[0];
        a.rows = number(x.extent[0]);
        a.columns = number(x.extent[1]);
        a.heads = 1;
        a.quantise = quantise(x.extent[1]);
        return a;
    }

    [[nodiscard]] cuda_launch::matvec_args router_input(const moe_args<matrix>& a) const {
        cuda_launch::matvec_args product = input(a.x);
        product.before = cuda_launch::prologue::rms_norm;
        product.norm = a.norm.data;
        product.epsilon = a.epsilon;
        product.quantise = 0;  // a choice hangs on it
        return product;
    }

    /// Takes what a mixer's kernel leaves for W_out, activations of heads of that width or codes of them, and answers
    /// W_out's input.
    template <class Mix>
    [[nodiscard]] cuda_launch::matvec_args take_mixed(index n, index head, const matrix& out, Mix& mix) {
        const index columns = out.on_device.columns;
        const bool codes = quantise(columns) == 1 && is_integer(out) && head % 32 == 0;
        const index code_bytes = cuda_launch::code_row_bytes(number(columns / 32));
        const auto values = workspace().take<float>(codes ? 0 : n, columns);
        const auto coded = workspace().take<unsigned char>(codes ? n : 0, code_bytes);
        mix.out = codes ? nullptr : values.data;
        mix.out_row = values.stride[0];
        mix.codes = codes ? coded.data : nullptr;
        cuda_launch::matvec_args a = input(values);
        a.rows = number(n);
        if (codes) a.before = cuda_launch::prologue::codes;
        a.codes = coded.data;
        a.codes_row = code_bytes;
        return a;
    }

    void multiply(cuda_launch::matvec_args a, std::initializer_list<linear<matrix>> products) {
        for_each_list(products, [&](const cuda_launch::product* list, int count) {
            std::copy_n(list, count, a.list);
            a.products = count;
            call("matmul", cuda_launch::matvec(a, stream()));
        });
    }

    void feed_forward(view<const float, 2> x, const cuda_launch::experts_args& a) {
        if (many(x)) {
            prefill().feed_forward({a});
        } else {
            experts_of_few(a);
        }
    }

    void experts_of_few(cuda_launch::experts_args a) {
        const arena::scope scope(workspace());
        a.quantise = quantise(a.gate.columns);
        const bool shared = a.shared_gate.data != nullptr;
        const index units = (std::max(a.gate.rows, shared ? a.shared_gate.rows : 0) + 31) / 32;
        const index slots = index{a.rows} * (a.k + (shared ? 1 : 0));
        a.hidden = workspace().take<float>(slots * units * (cuda_launch::hidden_unit_bytes / 4)).data;
        a.choice = workspace().take<unsigned long long>(a.k).data;
        call("experts", cuda_launch::experts(a, stream()));
    }

    cuda_batch_table table_;
    cuda_recordings recordings_;
};

static_assert(backend<cuda>);

}  // namespace keel::inline KEEL_ABI
