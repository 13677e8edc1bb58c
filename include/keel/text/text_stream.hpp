// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include <keel/core/compiler.hpp>
#include <keel/core/token.hpp>
#include <keel/text/tokenizer.hpp>
#include <keel/text/unicode.hpp>

namespace keel::inline KEEL_ABI {

/// Tokens to text as they come. A token may end in the middle of a character; the stream holds such bytes back (three
/// at most) until the rest arrives. What it gives out is valid UTF-8: bytes that cannot become a character are replaced
/// by U+FFFD. For the bytes themselves there is tokenizer::bytes. One per answer; not for sharing between threads.
class text_stream {
public:
    /// The tokenizer must outlive the stream. `render_special`: show control tokens by name.
    explicit text_stream(const tokenizer& vocabulary, bool render_special = false)
        : vocabulary_(&vocabulary), render_special_(render_special) {}

    /// The text that this token completes, perhaps none; valid until the next call.
    [[nodiscard]] std::string_view push(token id) {
        held_ += vocabulary_->bytes(id, render_special_);
        return release(false);
    }

    /// At the end of the answer: what was held back. The stream is then as new.
    [[nodiscard]] std::string_view flush() { return release(true); }

private:
    std::string_view release(bool at_end) {
        text_.clear();
        std::size_t i = 0;
        while (i < held_.size()) {
            const utf8_unit unit = decode_utf8(held_, i);
            if (unit.what == utf8_unit::truncated && !at_end) break;
            if (unit.what == utf8_unit::valid) {
                text_.append(held_, i, unit.length);
            } else {
                text_ += "\xEF\xBF\xBD";  // U+FFFD
            }
            i += unit.length;
        }
        held_.erase(0, i);
        return text_;
    }

    const tokenizer* vocabulary_;
    bool render_special_;
    std::string held_;
    std::string text_;
};

}  // namespace keel::inline KEEL_ABI
