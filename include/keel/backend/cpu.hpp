// SPDX-License-Identifier: MIT
//
// The backend that computes on the host's processors, in host memory.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/backend/cpu/attention.hpp>
#include <keel/backend/cpu/convolution.hpp>
#include <keel/backend/cpu/elementwise.hpp>
#include <keel/backend/cpu/experts.hpp>
#include <keel/backend/cpu/interleaved.hpp>
#include <keel/backend/cpu/kda.hpp>
#include <keel/backend/cpu/kda_mix.hpp>
#include <keel/backend/cpu/matmul.hpp>
#include <keel/backend/cpu/threads.hpp>
#include <keel/backend/fused.hpp>
#include <keel/backend/host_memory.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// Every operation is a free function of cpu/, to which this class lends its threads and its workspace.
class cpu : public host_memory {
public:
    using matrix = host_matrix;

    /// What instances share. Jobs of several instances run one after another, each on all threads.
    struct device {
        backend_options options;
        thread_pool pool;

        explicit device(const backend_options& chosen) : options(chosen), pool(chosen.threads) {}
    };

    cpu(std::shared_ptr<device> shared, index workspace_bytes)
        : host_memory(workspace_bytes), device_(std::move(shared)) {}

    static index scratch_bytes(const workspace_limits& limits, const backend_options& options) {
        const int threads = options.threads > 0 ? options.threads : detail::usable_cores();
        const index head_columns = std::max({limits.head_dim, limits.latent_rank, limits.mla_key, limits.mla_value});
        return std::max({
            matmul_scratch_bytes(limits.rows, 1, limits.columns, threads),
            matmul_scratch_bytes(limits.rows, limits.heads, head_columns, threads),
            experts_scratch_bytes(limits.rows, limits.rows, 1, limits.columns, limits.columns, threads),
            experts_scratch_bytes(limits.rows, limits.rows * limits.chosen, limits.experts, limits.columns,
                                  limits.expert_ff, threads),
            route_scratch_bytes(limits, threads),
            short_conv_scratch_bytes(limits, threads),
            kda_scratch_bytes(limits.head_dim, threads),
            kda_mix_scratch_bytes(limits, threads),
            latent_attend_scratch_bytes(limits, threads),
            expanded_attend_scratch_bytes(limits, threads),
        });
    }

    [[nodiscard]] matrix bind(const matrix_view& source, std::shared_ptr<const void> owner) const {
        return {source, std::move(owner)};
    }
    /// A copy of these weights, interleaved on all threads, if the options ask for that and the weights allow it.
    [[nodiscard]] std::optional<matrix> interleave(const matrix_view& source) const {
        const index bytes = interleaved_bytes(source, device_->options);
        if (bytes == 0) return {};
        const auto memory = take_large_pages(bytes);
        keel::interleave(source, memory.get(), pool());
        matrix copy{source, memory, true};
        copy.data = memory.get();
        return copy;
    }
    /// Bytes of that copy; 0 if there is none.
    static index interleaved_bytes(const matrix_view& w, const backend_options& options) {
        if (!options.interleave || options.precision == precision::exact) return 0;
        return w.count * w.rows * detail::interleaved_row_bytes(w);
    }
    [[nodiscard]] vector bind(std::vector<float> values) const { return {std::move(values)}; }

    [[nodiscard]] index prefill_from() const {
        return device_->options.precision == precision::exact ? std::numeric_limits<index>::max() : 16;
    }

    void embed(const embed_args<matrix>& a) { keel::embed(a, pool()); }
    void rms_norm(const rms_norm_args& a) { keel::rms_norm(a, pool()); }
    void matmul(view<const float, 2> x, std::initializer_list<linear<matrix>> products) {
        keel::matmul(x, products, wanted(), pool(), workspace());
    }
    void matmul_heads(const matmul_heads_args<matrix>& a) { keel::matmul_heads(a, wanted(), pool(), workspace()); }
    void short_conv(const short_conv_args& a) { keel::short_conv(a, pool(), workspace()); }
    void l2_norm(const l2_norm_args& a) { keel::l2_norm(a, pool()); }
    void kda_gates(const kda_gates_args& a) { keel::kda_gates(a, pool()); }
    void kda_step(const kda_args& a) { keel::kda_step(a, pool(), workspace()); }
    void kda_chunk(const kda_args& a) { keel::kda_chunk(a, pool(), workspace()); }
    void gated_norm(const gated_norm_args& a) { keel::gated_norm(a, pool()); }
    /// Whether kda_mix is for such a batch: with fewer heads than threads, a head's columns are shared out instead.
    [[nodiscard]] bool mixes(const batch& rows) const {
        return rows.layout->heads * std::ssize(rows.segments) >= pool().size();
    }
    void kda_mix(const kda_mix_args<matrix>& a) { keel::kda_mix(a, prefill_from(), wanted(), pool(), workspace()); }
    void latent_append(const latent_append_args& a) { keel::latent_append(a, pool()); }
    void latent_attend(const latent_attend_args& a) { keel::latent_attend(a, pool(), workspace()); }
    void expanded_attend(const expanded_attend_args<matrix>& a) { keel::expanded_attend(a, pool(), workspace()); }
    void swiglu(const swiglu_args<matrix>& a) { keel::swiglu(a, wanted(), pool(), workspace()); }
    void route(const route_args& a) { keel::route(a, pool(), workspace()); }
    void experts(const experts_args<matrix>& a) { keel::experts(a, wanted(), pool(), workspace()); }
    void add(const add_args& a) { keel::add(a, pool()); }
    void gather(const gather_args& a) { keel::gather(a, pool()); }

private:
    [[nodiscard]] precision wanted() const { return device_->options.precision; }
    [[nodiscard]] thread_pool& pool() const { return device_->pool; }

    std::shared_ptr<device> device_;
};

static_assert(backend<cpu>);

}  // namespace keel::inline KEEL_ABI
