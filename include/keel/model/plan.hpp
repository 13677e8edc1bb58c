// SPDX-License-Identifier: MIT
//
// How much memory a model needs, before anything is loaded. The workspace is found by running the forward pass on a
// backend that computes nothing and only counts what is taken.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <string_view>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf.hpp>
#include <keel/model/config.hpp>
#include <keel/model/forward.hpp>
#include <keel/model/history.hpp>
#include <keel/model/logits.hpp>
#include <keel/model/weights.hpp>

namespace keel::inline KEEL_ABI {

/// Bytes, exactly as they will be allocated at most; `weights` are those of the file's tensors where a backend maps
/// them in place. The tokenizer and the lists of tokens are in host memory, everything else in the backend's.
struct memory_plan {
    // Of the model.
    index weights = 0;
    index tokenizer = 0;  ///< and the metadata of the file, most of which are its words
    index workspace = 0;  ///< per batch in flight: one for each thread that runs sessions

    // Of a session.
    index state = 0;            ///< whatever its length: the recurrent state, and the logits behind it
    index cache_per_token = 0;  ///< of the latent cache
    index cache = 0;            ///< the same for a full context, in whole blocks, and the copy of one for going back
    index tokens = 0;           ///< the list of them, for a full context
    index checkpoints = 0;      ///< as many states again as its options allow
    index replay = 0;           ///< the state that a replay begins with, the next such, and the rows between

    [[nodiscard]] index session() const { return state + cache + tokens + checkpoints + replay; }
    [[nodiscard]] index total(index sessions = 1) const {
        return weights + tokenizer + workspace + sessions * session();
    }
};

namespace detail {

/// Satisfies the backend concept with operations that do nothing.
class counting_backend {
public:
    struct matrix {};
    struct vector {
        operator view<const float, 1>() const { return {}; }
    };
    struct device {};
    struct buffer {
        [[nodiscard]] std::byte* data() const { return nullptr; }
        [[nodiscard]] index size() const { return 0; }
    };

    [[nodiscard]] buffer allocate(index) const { return {}; }
    void upload(std::byte*, const std::byte*, index) const {}
    void download(std::byte*, const std::byte*, index) const {}
    [[nodiscard]] arena& workspace() { return workspace_; }
    static index scratch_bytes(const workspace_limits&, const backend_options&) { return 0; }
    [[nodiscard]] matrix bind(const matrix_view&, const std::shared_ptr<const void>&) const { return {}; }
    [[nodiscard]] vector bind(const std::vector<float>&) const { return {}; }
    [[nodiscard]] index prefill_from() const { return 2; }

    void embed(const embed_args<matrix>&) {}
    void rms_norm(const rms_norm_args&) {}
    void matmul(view<const float, 2>, std::initializer_list<linear<matrix>>) {}
    void matmul_heads(const matmul_heads_args<matrix>&) {}
    void short_conv(const short_conv_args&) {}
    void l2_norm(const l2_norm_args&) {}
    void kda_gates(const kda_gates_args&) {}
    void kda_step(const kda_args&) {}
    void kda_chunk(const kda_args&) {}
    void gated_norm(const gated_norm_args&) {}
    void latent_append(const latent_append_args&) {}
    void latent_attend(const latent_attend_args&) {}
    void expanded_attend(const expanded_attend_args<matrix>&) {}
    void swiglu(const swiglu_args<matrix>&) {}
    void route(const route_args&) {}
    void experts(const experts_args<matrix>&) {}
    void add(const add_args&) {}
    void gather(const gather_args&) {}

private:
    arena workspace_;
};

}  // namespace detail

/// Rows whose logits are projected together; it bounds the workspace that logits take.
inline constexpr index logits_rows = 64;

/// Bytes of workspace that a backend needs for batches of up to `rows` rows of sequences up to `context` tokens.
template <backend B>
index workspace_bytes(const config& c, const backend_options& options, index rows, index context) {
    detail::counting_backend counter;
    const auto nothing = make_layers<detail::counting_backend>(c);
    const std::vector<token> tokens(static_cast<std::size_t>(rows));
    std::vector<index> wanted(static_cast<std::size_t>(rows));
    const memory_layout layout = c.memory(options.precision);
    // One row to decode and the others to prefill: what is taken for either form is counted.
    std::vector<segment> segments{{.first_row = 0, .rows = 1}};
    if (rows > 1) segments.push_back({.first_row = 1, .rows = std::max<index>(rows - 1, 2)});
    const auto hidden = forward(counter, c, nothing, {tokens, segments, wanted, &layout});
    const auto out = take_projected<B>(counter.workspace(), std::min(rows, logits_rows), c.vocabulary);
    project_logits(counter, c, nothing, hidden, out);
    return counter.workspace().peak() + B::scratch_bytes(c.limits(rows, context), options);
}

/// Bytes of a file's tensors.
inline index weight_bytes(const gguf& file) {
    index bytes = 0;
    for (const tensor_info& t : file.tensors()) bytes += static_cast<index>(t.data.size());
    return bytes;
}

/// Bytes that a backend keeps them in: those of the file, unless it repacks or interleaves quantised rows.
template <backend B>
index weight_bytes_of(const gguf& file, [[maybe_unused]] const backend_options& options) {
    index bytes = weight_bytes(file);
    for ([[maybe_unused]] const tensor_info& t : file.tensors()) {
        if constexpr (requires { B::record_bytes(dtype{}, index{}); }) {
            if (t.type->block_elements == 1) continue;
            const index in_file = static_cast<index>(t.data.size());
            const index row = t.dims[0] / t.type->block_elements * t.type->block_bytes;
            bytes += in_file / row * B::record_bytes(static_cast<dtype>(t.type_id), t.dims[0]) - in_file;
        }
        if constexpr (requires { B::interleaved_bytes(matrix_view{}, options); }) {
            if (!t.type->supported || !is_only_multiplied(t.name)) continue;
            const matrix_view w{nullptr, static_cast<dtype>(t.type_id), t.dims[2], t.dims[1], t.dims[0]};
            const index copied = B::interleaved_bytes(w, options);
            if (copied > 0) bytes += copied - w.bytes();
        }
    }
    return bytes;
}

/// Bytes that a single token at `position` has to read or write, at least: of the weights those that it uses (one row
/// of the embedding, the chosen experts), the recurrent state twice, the rows of the latent cache.
inline index bytes_per_token(const gguf& file, const config& c, const memory_layout& layout, index position) {
    index bytes = 2 * layout.recurrent_bytes() + position * layout.mla_layers * layout.latent_row_bytes();
    for (const tensor_info& t : file.tensors()) {
        const index all = static_cast<index>(t.data.size());
        if (t.name == "token_embd.weight") {
            bytes += all / c.vocabulary;
        } else if (t.name.find("_exps.") != std::string_view::npos) {
            bytes += all / c.experts * c.chosen;
        } else {
            bytes += all;
        }
    }
    return bytes;
}

/// What a plan depends on, besides the model.
struct plan_options {
    backend_options backend;
    index weight_bytes = 0;
    index tokenizer_bytes = 0;
    index batch_rows = 0;
    index context = 0;
    index checkpoint_bytes = 0;  ///< what a session may keep in checkpoints
    index replay = 0;            ///< tokens that it can go back by replay
};

template <backend B>
memory_plan make_plan(const config& c, const plan_options& o) {
    const memory_layout layout = c.memory(o.backend.precision);
    const index state = state_bytes(layout, c.vocabulary);
    return {.weights = o.weight_bytes,
            .tokenizer = o.tokenizer_bytes,
            .workspace = workspace_bytes<B>(c, o.backend, o.batch_rows, o.context),
            .state = state,
            .cache_per_token = layout.mla_layers * layout.latent_row_bytes(),
            .cache = (static_cast<index>(layout.blocks(o.context)) + 1) * layout.block_bytes(),
            .tokens = o.context * static_cast<index>(sizeof(token)),
            .checkpoints = std::min(o.checkpoint_bytes / state, o.context) * state,
            .replay = o.replay == 0 ? 0 : 2 * state + replay_window_bytes(layout, o.replay)};
}

}  // namespace keel::inline KEEL_ABI
