// SPDX-License-Identifier: MIT
//
// Text to tokens and back for the Kimi family: byte-level byte-pair encoding with the pre-tokenizer "kimi-k2".
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/token.hpp>
#include <keel/core/view.hpp>
#include <keel/text/byte_pairs.hpp>
#include <keel/text/pretokenizer.hpp>

namespace keel::inline KEEL_ABI {

/// What a token is for; the values are those of tokenizer.ggml.token_type.
enum class token_type : std::uint8_t {
    normal = 1,        ///< bytes of text
    unknown = 2,       ///< treated as control
    control = 3,       ///< structure, such as <|im_end|>: not shown, and found in text only on request
    user_defined = 4,  ///< text that is always one token
    unused = 5,        ///< a gap in the vocabulary: never found, never shown
};

/// What a model file says about its tokenizer, unchecked. The comments name the GGUF keys (after "tokenizer."). The
/// views need to live until the tokenizer is made and no longer.
struct tokenizer_data {
    std::string_view model = "gpt2";                // ggml.model
    std::string_view pre = "kimi-k2";               // ggml.pre
    std::span<const std::string_view> tokens = {};  // ggml.tokens, by id; normal ones in printable form
    std::span<const std::int32_t> types = {};       // ggml.token_type; empty: all are normal
    std::span<const std::string_view> merges = {};  // ggml.merges, "left right"; empty: follow from the tokens
    std::optional<std::int64_t> bos = {};           // ggml.bos_token_id; absent means that there is none
    std::optional<std::int64_t> eos = {};           // ggml.eos_token_id
    std::optional<std::int64_t> eot = {};           // ggml.eot_token_id
    std::optional<std::int64_t> eom = {};           // ggml.eom_token_id
    std::optional<std::int64_t> padding = {};       // ggml.padding_token_id
    std::optional<std::int64_t> unknown = {};       // ggml.unknown_token_id
    bool add_bos = false;                           // ggml.add_bos_token
    std::string_view chat_template = {};            // chat_template
};

namespace detail {

/// Finds tokens that are matched as text before the pre-tokenizer: a sorted list, searched byte by byte.
class special_tokens {
public:
    void add(token id) { ids_.push_back(id); }

    /// After the last add().
    void sort(const token_texts& texts) {
        std::ranges::sort(ids_, {}, [&](token id) { return texts[id]; });
        for (const token id : ids_) begins_[static_cast<unsigned char>(texts[id][0])] = true;
    }

    const std::vector<token>& ids() const { return ids_; }

    struct occurrence {
        std::size_t start;
        token id = no_token;
    };

    /// The first occurrence that begins at `from` or later, and of those that begin there the longest.
    occurrence find_first(std::string_view text, std::size_t from, const token_texts& texts) const {
        for (std::size_t i = from; i < text.size(); ++i) {
            if (!begins_[static_cast<unsigned char>(text[i])]) continue;
            const token longest = longest_prefix(text.substr(i), texts);
            if (longest != no_token) return {i, longest};
        }
        return {text.size()};
    }

    /// The longest token that the text begins with, or no_token.
    token longest_prefix(std::string_view text, const token_texts& texts) const {
        token longest = no_token;
        auto first = ids_.begin();  // the range of those that agree with the text in the first `depth` bytes
        auto last = ids_.end();
        for (std::size_t depth = 0; first != last; ++depth) {
            if (texts[*first].size() == depth) longest = *first++;
            if (depth == text.size()) break;
            const auto byte_at_depth = [&](token id) { return static_cast<unsigned char>(texts[id][depth]); };
            const auto wanted = static_cast<unsigned char>(text[depth]);
            first = std::ranges::lower_bound(first, last, wanted, {}, byte_at_depth);
            last = std::ranges::upper_bound(first, last, wanted, {}, byte_at_depth);
        }
        return longest;
    }

private:
    std::vector<token> ids_;          // sorted by text
    std::array<bool, 256> begins_{};  // bytes that one of them begins with
};

}  // namespace detail

/// A vocabulary, ready to use. Immutable: any number of threads may share one.
class tokenizer {
public:
    /// Copies what it needs. Throws errc::format if the data is damaged or contradicts itself, errc::unsupported if it
    /// is of another kind of tokenizer; the message names the token, the merge or the key.
    explicit tokenizer(const tokenizer_data& data);

    /// The tokens of a text; any bytes will do, and decode() gives them back. No bos is put in front. Control tokens
    /// are recognised only if `parse_special`: leave it off for what a user has typed. Of special tokens that overlap
    /// in the text the leftmost wins, and of those that begin at the same byte the longest. Time is n log n in the
    /// longest piece and linear in the rest. Throws errc::capacity for a piece of 4 GiB.
    [[nodiscard]] std::vector<token> encode(std::string_view text, bool parse_special = false) const;

    /// What a token stands for: any part of a UTF-8 text, not only whole characters. Nothing for control tokens, or,
    /// if `render_special`, their names. Lives as long as the tokenizer. Throws errc::argument for an unknown id.
    [[nodiscard]] std::string_view bytes(token id, bool render_special = false) const;

    /// The bytes of all tokens, joined.
    [[nodiscard]] std::string decode(std::span<const token> ids, bool render_special = false) const;

    /// The control, unknown or user-defined token of that name, such as "<|im_end|>".
    [[nodiscard]] std::optional<token> find(std::string_view name) const;

    /// Throws errc::argument for an unknown id.
    [[nodiscard]] token_type type(token id) const { return types_[checked(id)]; }

    /// Tokens in the vocabulary.
    [[nodiscard]] index size() const { return static_cast<index>(types_.size()); }

    [[nodiscard]] std::optional<token> bos() const { return bos_; }
    [[nodiscard]] std::optional<token> eos() const { return eos_; }
    [[nodiscard]] std::optional<token> padding() const { return padding_; }
    [[nodiscard]] std::optional<token> unknown() const { return unknown_; }

    /// The model was trained with bos in front of every document; put there by whoever starts one.
    [[nodiscard]] bool add_bos() const { return add_bos_; }

    /// The tokens that end an answer, in increasing order: those that the file names (eos, eot, eom) and those with
    /// a name that the family's models end with. The file's eos alone is not reliable.
    [[nodiscard]] const std::vector<token>& end_of_generation() const { return end_of_generation_; }
    [[nodiscard]] bool is_end_of_generation(token id) const {
        return std::ranges::binary_search(end_of_generation_, id);
    }

    /// The file's own template (Jinja text), for hosts that want to run it; keel uses text/chat.hpp.
    [[nodiscard]] const std::string& chat_template() const { return chat_template_; }

    /// What its tables take.
    [[nodiscard]] index memory_bytes() const {
        return static_cast<index>(types_.size() + texts_.memory_bytes() + index_.memory_bytes() +
                                  merges_.memory_bytes());
    }

private:
    [[noreturn]] static void fail(errc code, const std::string& what) { throw error(code, "tokenizer", what); }

    std::size_t checked(token id) const;
    std::optional<token> checked(std::optional<std::int64_t> id, std::string_view name) const;

    void read_tokens(const tokenizer_data& data);
    void read_merges(std::span<const std::string_view> lines);
    void rebuild_merges();
    void collect_special();
    void encode_plain(std::string_view text, detail::pair_merger& merger, std::vector<token>& out) const;

    std::vector<token_type> types_;
    detail::token_texts texts_;  // bytes of normal tokens, names of the others
    detail::token_index index_;  // of the normal tokens
    std::size_t longest_ = 0;    // bytes of the longest of these
    std::array<token, 256> byte_tokens_;
    detail::merge_table merges_;
    detail::special_tokens special_;  // control, unknown, user-defined
    detail::special_tokens user_defined_;
    std::optional<token> bos_, eos_, padding_, unknown_;
    bool add_bos_;
    std::vector<token> end_of_generation_;
    std::string chat_template_;
};

inline tokenizer::tokenizer(const tokenizer_data& data)
    : index_(data.tokens.size()),
      merges_(data.merges.empty() ? data.tokens.size() : data.merges.size()),
      add_bos_(data.add_bos),
      chat_template_(data.chat_template) {
    const auto named = [](std::string_view name) { return "\"" + std::string(name.substr(0, 40)) + "\""; };
    if (data.model != "gpt2") {
        fail(errc::unsupported, "the model " + named(data.model) + " is not byte-level BPE (\"gpt2\")");
    }
    if (data.pre != "kimi-k2") {
        fail(errc::unsupported, "the pre-tokenizer " + named(data.pre) + " is not \"kimi-k2\"");
    }
    read_tokens(data);
    if (data.merges.empty()) {
        rebuild_merges();
    } else {
        read_merges(data.merges);
    }
    collect_special();

    bos_ = checked(data.bos, "bos");
    eos_ = checked(data.eos, "eos");
    padding_ = checked(data.padding, "padding");
    unknown_ = checked(data.unknown, "unknown");

    for (const auto id : {eos_, checked(data.eot, "eot"), checked(data.eom, "eom"), find("<|im_end|>"),
                          find("<|end_of_msg|>"), find("[EOS]"), find("[EOT]"), find("[PAD]"), find("<|eot_id|>"),
                          find("<|endoftext|>"), find("<|end|>"), find("<|end_of_text|>")}) {
        if (id) end_of_generation_.push_back(*id);
    }
    std::ranges::sort(end_of_generation_);
    end_of_generation_.erase(std::unique(end_of_generation_.begin(), end_of_generation_.end()),
                             end_of_generation_.end());
}

inline std::size_t tokenizer::checked(token id) const {
    if (id < 0 || id >= size()) {
        throw error(errc::argument, "token " + std::to_string(id),
                    "outside the vocabulary of " + std::to_string(size()) + " tokens");
    }
    return static_cast<std::size_t>(id);
}

inline std::optional<token> tokenizer::checked(std::optional<std::int64_t> id, std::string_view name) const {
    if (!id) return std::nullopt;
    if (*id < 0 || *id >= size()) {
        fail(errc::format, std::string(name) + "_token_id is " + std::to_string(*id) + ", outside the vocabulary of " +
                               std::to_string(size()) + " tokens");
    }
    return static_cast<token>(*id);
}

inline void tokenizer::read_tokens(const tokenizer_data& data) {
    const std::size_t count = data.tokens.size();
    if (count == 0) fail(errc::format, "the vocabulary is empty");
    if (count > std::size_t{std::numeric_limits<token>::max()})
        fail(errc::format, "the vocabulary has too many tokens");
    if (!data.types.empty() && data.types.size() < count) {
        fail(errc::format, "token_type has " + std::to_string(data.types.size()) + " entries for " +
                               std::to_string(count) + " tokens");
    }

    std::size_t bytes = 0;
    for (const std::string_view text : data.tokens) bytes += text.size();
    texts_.reserve(count, bytes);
    types_.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
        const auto id = static_cast<token>(i);
        const std::int32_t type = data.types.empty() ? static_cast<std::int32_t>(token_type::normal) : data.types[i];
        if (type < 1 || type > 5) {
            fail(errc::format, "token " + std::to_string(id) + " has type " + std::to_string(type) +
                                   ", which a byte-level vocabulary does not use");
        }
        types_.push_back(static_cast<token_type>(type));
        if (types_[i] != token_type::normal) {
            texts_.add([&](std::string& out) { out += data.tokens[i]; });
            continue;
        }
        texts_.add([&](std::string& out) {
            if (detail::append_bytes(data.tokens[i], out)) return;
            fail(errc::format, "token " + std::to_string(id) + " holds a character that stands for no byte");
        });
        if (texts_[id].empty()) continue;  // stands for nothing, and nothing becomes it
        longest_ = std::max(longest_, texts_[id].size());
        const token same = index_.insert(id, texts_);
        if (same != id)
            fail(errc::format, "tokens " + std::to_string(same) + " and " + std::to_string(id) + " are equal");
    }

    for (std::size_t byte = 0; byte < 256; ++byte) {
        const char c = static_cast<char>(byte);
        byte_tokens_[byte] = index_.find({&c, 1}, texts_);
        if (byte_tokens_[byte] < 0) fail(errc::format, "no token stands for the byte " + std::to_string(byte));
    }
}

inline void tokenizer::read_merges(std::span<const std::string_view> lines) {
    std::string joined;
    for (std::size_t i = 0; i < lines.size(); ++i) {
        const auto reject = [&](const std::string& what) { fail(errc::format, "merge " + std::to_string(i) + what); };
        const std::size_t space = lines[i].find(' ');
        if (space == std::string_view::npos || space == 0 || space + 1 == lines[i].size() ||
            lines[i].find(' ', space + 1) != std::string_view::npos) {
            reject(" is not two parts with one space between");
        }
        joined.clear();
        const bool left_printable = detail::append_bytes(lines[i].substr(0, space), joined);
        const std::size_t middle = joined.size();
        if (!left_printable || !detail::append_bytes(lines[i].substr(space + 1), joined)) {
            reject(" holds a character that stands for no byte");
        }
        const token left = index_.find(std::string_view(joined).substr(0, middle), texts_);
        const token right = index_.find(std::string_view(joined).substr(middle), texts_);
        const token merged = index_.find(joined, texts_);
        if (left < 0) reject(": its left part is not a token");
        if (right < 0) reject(": its right part is not a token");
        if (merged < 0) reject(": its result is not a token");
        if (!merges_.add(left, right, merged)) reject(" repeats an earlier one");
    }
}

// A token is made of the two parts that its bytes become with the merges of all tokens before it. One that ends in
// more parts cannot come about by merging; it is still found as a whole piece.
inline void tokenizer::rebuild_merges() {
    detail::pair_merger merger;
    std::vector<token> parts;
    for (token id = 0; id < size(); ++id) {
        if (types_[static_cast<std::size_t>(id)] != token_type::normal) continue;
        parts.clear();
        merger.merge(texts_[id], byte_tokens_, merges_, parts);
        if (parts.size() == 2) merges_.add(parts[0], parts[1], id);
    }
}

inline void tokenizer::collect_special() {
    std::string as_normal;
    for (token id = 0; id < size(); ++id) {
        const token_type type = types_[static_cast<std::size_t>(id)];
        if (type == token_type::normal || type == token_type::unused || texts_[id].empty()) continue;
        special_.add(id);
        if (type == token_type::user_defined) user_defined_.add(id);

        as_normal.clear();
        if (!detail::append_bytes(texts_[id], as_normal)) continue;
        const token same = index_.find(as_normal, texts_);
        if (same >= 0)
            fail(errc::format, "tokens " + std::to_string(same) + " and " + std::to_string(id) + " are equal");
    }
    special_.sort(texts_);
    user_defined_.sort(texts_);
    const auto same = [&](token a, token b) { return texts_[a] == texts_[b]; };
    const auto twin = std::ranges::adjacent_find(special_.ids(), same);
    if (twin != special_.ids().end()) {
        fail(errc::format, "tokens " + std::to_string(twin[0]) + " and " + std::to_string(twin[1]) + " are equal");
    }
}

inline std::vector<token> tokenizer::encode(std::string_view text, bool parse_special) const {
    std::vector<token> out;
    detail::pair_merger merger;
    const detail::special_tokens& special = parse_special ? special_ : user_defined_;
    std::size_t begin = 0;
    while (begin < text.size()) {
        const auto found = special.find_first(text, begin, texts_);
        encode_plain(text.substr(begin, found.start - begin), merger, out);
        if (found.id == detail::no_token) break;
        out.push_back(found.id);
        begin = found.start + texts_[found.id].size();
    }
    return out;
}

inline void tokenizer::encode_plain(std::string_view text, detail::pair_merger& merger, std::vector<token>& out) const {
    for_each_piece(text, [&](std::string_view piece) {
        const token whole = piece.size() <= longest_ ? index_.find(piece, texts_) : detail::no_token;
        if (whole >= 0) {
            out.push_back(whole);
        } else {
            merger.merge(piece, byte_tokens_, merges_, out);
        }
    });
}

inline std::string_view tokenizer::bytes(token id, bool render_special) const {
    switch (type(id)) {
        case token_type::normal:
        case token_type::user_defined:
            return texts_[id];
        case token_type::control:
        case token_type::unknown:
            return render_special ? texts_[id] : std::string_view();
        case token_type::unused:
            break;
    }
    return {};
}

inline std::string tokenizer::decode(std::span<const token> ids, bool render_special) const {
    std::string out;
    for (const token id : ids) out += bytes(id, render_special);
    return out;
}

inline std::optional<token> tokenizer::find(std::string_view name) const {
    const token found = special_.longest_prefix(name, texts_);
    if (found == detail::no_token || texts_[found] != name) return std::nullopt;
    return found;
}

}  // namespace keel::inline KEEL_ABI
