// SPDX-License-Identifier: MIT
//
// A sequence as a snapshot on disk (io/snapshot.hpp): its tokens, its state, its checkpoints, and which model it
// belongs to.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>
#include <keel/io/snapshot.hpp>
#include <keel/model/executor.hpp>
#include <keel/model/history.hpp>
#include <keel/model/logits.hpp>
#include <keel/model/sequence.hpp>
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

/// Throws unless the numbers in a snapshot fit together and belong to such a model; `states` are those of the file.
template <backend B>
void require_sound(const snapshot& file, std::span<const snapshot_state> states, std::uint64_t model,
                   const executor<B>& run, index context) {
    const snapshot_header& header = file.header();
    const memory_layout layout = run.layout();
    if (header.model != model) file.fail(errc::argument, "belongs to another model");
    if (header.layout != numbers_of(layout)) file.fail(errc::argument, "was made with another precision");
    if (header.tokens > static_cast<std::uint64_t>(context)) {
        file.fail(errc::capacity, "holds " + std::to_string(header.tokens) + " tokens, more than the context of " +
                                      std::to_string(context));
    }
    const auto require = [&](bool good) {
        if (!good) file.fail(errc::format, "contradicts itself");
    };
    require(header.recurrent_bytes == static_cast<std::uint64_t>(layout.recurrent_bytes()));
    require(header.block_bytes == static_cast<std::uint64_t>(layout.block_bytes()));
    require(!states.empty() && states.back().tokens <= header.tokens);
    require(header.blocks == layout.blocks(static_cast<index>(states.back().tokens)));

    // Checkpoints, each longer than the one before, and at last the state, which may be as long as the last of them.
    const auto checkpoints = states.first(states.size() - 1);
    std::uint64_t rows = 0, length = 0;
    for (const snapshot_state& s : checkpoints) {
        require(s.tokens > length);
        length = s.tokens;
    }
    require(states.back().tokens >= length);
    for (const snapshot_state& s : states) {
        require(s.has_logits <= 1);
        rows += s.has_logits;
    }
    require(header.logits == rows * static_cast<std::uint64_t>(run.shape().vocabulary));
    require(header.marked <= 1 ||
            std::ranges::any_of(checkpoints, [&](const snapshot_state& s) { return s.tokens + 1 == header.marked; }));
}

}  // namespace detail

/// Saves tokens and the sequence that holds all but perhaps the last ones. `model` is the fingerprint that the file
/// will be held to. The file appears under its name when it is complete, replacing an older one in one step. Throws
/// errc::file.
template <backend B>
void save_sequence(const std::filesystem::path& path, std::uint64_t model, const executor<B>& run,
                   std::span<const token> tokens, sequence<B>& from) {
    const memory_layout& layout = from.state().layout();
    std::vector<snapshot_state> states;
    std::vector<float> logits;
    const auto add = [&](index length, kept_logits<B>* known) {
        states.push_back({static_cast<std::uint64_t>(length), known != nullptr});
        if (known == nullptr) return;
        const auto row = known->values(run);
        logits.insert(logits.end(), row.begin(), row.end());
    };
    for (const state_copy<B>& copy : from.history().copies()) {
        std::optional<kept_logits<B>> known;
        if (copy.logits != nullptr) known = *copy.logits;
        add(copy.length, known ? &*known : nullptr);
    }
    add(from.length(), from.has_logits() ? &from.logits() : nullptr);

    snapshot_header header;
    header.model = model;
    header.layout = detail::numbers_of(layout);
    header.tokens = tokens.size();
    header.states = states.size();
    header.marked = static_cast<std::uint64_t>(from.history().marked().value_or(-1) + 1);
    header.logits = logits.size();
    header.recurrent_bytes = static_cast<std::uint64_t>(layout.recurrent_bytes());
    header.blocks = from.state().blocks().size();
    header.block_bytes = static_cast<std::uint64_t>(layout.block_bytes());
    snapshot_writer file(path, header);
    file.write(std::as_bytes(tokens));
    file.write(std::as_bytes(std::span(states)));
    file.write(std::as_bytes(std::span(logits)));
    run.with_backend([&](B& b) {
        std::vector<std::byte> piece(std::size_t{1} << 18);  // stays in a near cache
        const auto write = [&](const typename B::buffer& bytes) {
            for (index done = 0; done < bytes.size();) {
                const index n = std::min(bytes.size() - done, static_cast<index>(piece.size()));
                b.download(piece.data(), bytes.data() + done, n);
                file.write(std::span(piece).first(static_cast<std::size_t>(n)));
                done += n;
            }
        };
        for (const state_copy<B>& copy : from.history().copies()) write(*copy.recurrent);
        write(from.state().recurrent());
        for (const auto& block : from.state().blocks()) write(*block);
    });
    file.commit();
}

/// Fills an empty sequence, with as many of the checkpoints as it may keep, and answers the tokens. Throws
/// errc::argument if the file belongs to another model or precision, errc::capacity if it holds more tokens than the
/// sequence may, errc::format if it contradicts itself.
template <backend B>
std::vector<token> load_sequence(const snapshot& file, std::uint64_t model, const executor<B>& run, sequence<B>& to) {
    const snapshot_header& header = file.header();
    const auto states = detail::values_of<snapshot_state>(file.states);
    detail::require_sound(file, states, model, run, to.context());

    const memory_layout layout = run.layout();
    const auto vocabulary = static_cast<std::size_t>(run.shape().vocabulary);
    auto logits = file.logits;
    run.with_backend([&](B& b) {
        if (header.marked == 1 || (header.marked > 1 && to.history().most() > 0)) {
            to.history().mark(static_cast<index>(header.marked - 1));
        }
        for (std::size_t i = 0; i < states.size(); ++i) {
            const auto length = static_cast<index>(states[i].tokens);
            const auto row = logits.first(states[i].has_logits * vocabulary * sizeof(float));
            logits = logits.subspan(row.size());
            const auto known = [&] {
                return row.empty() ? nullptr : std::make_shared<const kept_logits<B>>(detail::values_of<float>(row));
            };
            if (i + 1 == states.size()) {
                to.load(b, length, file.recurrent[i], file.blocks, known());
            } else {
                to.history().add(length, [&]() -> state_copy<B> {
                    typename B::buffer recurrent = b.allocate(layout.recurrent_bytes());
                    b.upload(recurrent.data(), file.recurrent[i].data(), recurrent.size());
                    return {length, std::make_shared<const typename B::buffer>(std::move(recurrent)), known()};
                });
            }
        }
    });
    return detail::values_of<token>(file.tokens);
}

}  // namespace keel::inline KEEL_ABI
