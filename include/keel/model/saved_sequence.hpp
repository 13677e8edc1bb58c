// SPDX-License-Identifier: MIT
//
// A sequence as a snapshot on disk (io/snapshot.hpp): its tokens, its state, its logits, and which model it belongs to.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>
#include <keel/io/snapshot.hpp>
#include <keel/model/executor.hpp>
#include <keel/model/state.hpp>

namespace keel::inline KEEL_ABI {

namespace detail {

inline std::array<std::uint64_t, 8> numbers_of(const memory_layout& l) {
    const auto number = [](index n) { return static_cast<std::uint64_t>(n); };
    return {number(l.kda_layers), number(l.heads),        number(l.head_dim),   number(l.taps),
            number(l.mla_layers), number(l.latent_width), number(l.block_rows), static_cast<std::uint64_t>(l.cache)};
}

template <class T>
std::vector<T> values_of(std::span<const std::byte> bytes) {
    std::vector<T> values(bytes.size() / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
}

}  // namespace detail

/// A sequence that was saved.
template <backend B>
struct saved_sequence {
    std::vector<token> tokens;  ///< the state holds all but perhaps the last ones
    sequence_state<B> state;
    std::vector<float> logits;  ///< behind the state's last token, or empty
};

/// `model` is the fingerprint that the file will be held to. The file appears under its name when it is complete,
/// replacing an older one in one step. Throws errc::file.
template <backend B>
void save_sequence(const std::filesystem::path& path, std::uint64_t model, const executor<B>& run,
                   std::span<const token> tokens, const sequence_state<B>& state, std::span<const float> logits) {
    const memory_layout& layout = state.layout();
    snapshot_header header;
    header.model = model;
    header.layout = detail::numbers_of(layout);
    header.state_tokens = static_cast<std::uint64_t>(state.length());
    header.tokens = tokens.size();
    header.logits = logits.size();
    header.recurrent_bytes = static_cast<std::uint64_t>(layout.recurrent_bytes());
    header.blocks = state.blocks().size();
    header.block_bytes = static_cast<std::uint64_t>(layout.block_bytes());
    snapshot_writer file(path, header);
    file.write(std::as_bytes(tokens));
    file.write(std::as_bytes(logits));
    run.with_backend([&](B& b) {
        std::vector<std::byte> piece(std::size_t{1} << 18);  // stays in a near cache
        const auto write = [&](const typename B::buffer& from) {
            for (index done = 0; done < from.size();) {
                const index n = std::min(from.size() - done, static_cast<index>(piece.size()));
                b.download(piece.data(), from.data() + done, n);
                file.write(std::span(piece).first(static_cast<std::size_t>(n)));
                done += n;
            }
        };
        write(state.recurrent());
        for (const auto& block : state.blocks()) write(*block);
    });
    file.commit();
}

/// Throws errc::argument if the file belongs to another model or precision, errc::format if it contradicts itself.
template <backend B>
saved_sequence<B> load_sequence(const snapshot& file, std::uint64_t model, const executor<B>& run) {
    const snapshot_header& header = file.header();
    const memory_layout layout = run.layout();
    if (header.model != model) file.fail(errc::argument, "belongs to another model");
    if (header.layout != detail::numbers_of(layout)) file.fail(errc::argument, "was made with another precision");
    const auto length = static_cast<index>(header.state_tokens);
    if (header.state_tokens > header.tokens ||
        (header.logits != 0 && header.logits != static_cast<std::uint64_t>(run.shape().vocabulary)) ||
        header.recurrent_bytes != static_cast<std::uint64_t>(layout.recurrent_bytes()) ||
        header.blocks != layout.blocks(length) ||
        header.block_bytes != static_cast<std::uint64_t>(layout.block_bytes())) {
        file.fail(errc::format, "contradicts itself");
    }
    return {detail::values_of<token>(file.tokens),
            run.with_backend([&](B& b) { return sequence_state<B>(b, layout, length, file.recurrent, file.blocks); }),
            detail::values_of<float>(file.logits)};
}

}  // namespace keel::inline KEEL_ABI
