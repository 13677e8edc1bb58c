// SPDX-License-Identifier: MIT
//
// Conversations as the models have seen them in training: the layout of messages as data, no template engine. This is
// the "im" layout of Kimi-Linear, Kimi-K2 and Moonlight. A message is
//
//   <|im_ROLE|>NAME<|im_middle|>CONTENT<|im_end|>
//
// with ROLE user, assistant or system, and NAME the role or a name of one's own. Tools are declared in a system message
// named tool_declare; a tool's result is a system message named after the tool. Calls follow the assistant's content:
//
//   <|tool_calls_section_begin|><|tool_call_begin|>ID<|tool_call_argument_begin|>JSON<|tool_call_end|> ...
//   <|tool_calls_section_end|>                                                       (all on one line)
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/token.hpp>
#include <keel/text/tokenizer.hpp>

namespace keel::inline KEEL_ABI {

enum class chat_role { system, user, assistant, tool };

/// A tool that the assistant calls.
struct chat_call {
    std::string id = {};         ///< "functions.NAME:N", N counting the calls of the whole conversation from 0
    std::string arguments = {};  ///< JSON text
};

/// One message of a conversation, to be filled by designated initialisers.
struct chat_message {
    chat_role role = chat_role::user;
    std::string content = {};
    std::string name = {};              ///< shown to the model in place of the role; for a result, the tool's
    std::vector<chat_call> calls = {};  ///< of the assistant only
    std::string call_id = {};           ///< of a tool's result: the call that it answers
};

struct chat_options {
    std::string_view tools = {};  ///< JSON array of tool declarations, compact and with sorted keys; empty: none
    bool after_answer = false;    ///< the messages continue a conversation whose last answer lacks its end token
    bool answer = true;           ///< open the assistant's message, for the model to write it
};

/// The markers of a layout. Each is one control token of the vocabulary.
struct chat_layout {
    std::string_view system, user, assistant;  // begin a message
    std::string_view middle;                   // between name and content
    std::string_view end;                      // of a message
    std::string_view calls_begin, call_begin, call_arguments, call_end, calls_end;
};

inline constexpr chat_layout im_layout{
    .system = "<|im_system|>",
    .user = "<|im_user|>",
    .assistant = "<|im_assistant|>",
    .middle = "<|im_middle|>",
    .end = "<|im_end|>",
    .calls_begin = "<|tool_calls_section_begin|>",
    .call_begin = "<|tool_call_begin|>",
    .call_arguments = "<|tool_call_argument_begin|>",
    .call_end = "<|tool_call_end|>",
    .calls_end = "<|tool_calls_section_end|>",
};

namespace detail {

/// Receives a conversation as text.
class chat_text_writer {
public:
    void marker(std::string_view name) { out_ += name; }
    void text(std::string_view content) { out_ += content; }
    std::string finish() { return std::move(out_); }

private:
    std::string out_;
};

/// Receives a conversation as tokens. Only markers become control tokens, whatever the content may look like.
class chat_token_writer {
public:
    explicit chat_token_writer(const tokenizer& vocabulary) : vocabulary_(vocabulary) {}

    void marker(std::string_view name) {
        const auto id = vocabulary_.find(name);
        if (!id) throw error(errc::unsupported, "chat", "the vocabulary has no token " + std::string(name));
        encode_text();
        out_.push_back(*id);
    }
    void text(std::string_view content) { text_ += content; }
    std::vector<token> finish() {
        encode_text();
        return std::move(out_);
    }

private:
    void encode_text() {
        const std::vector<token> ids = vocabulary_.encode(text_);
        out_.insert(out_.end(), ids.begin(), ids.end());
        text_.clear();
    }

    const tokenizer& vocabulary_;
    std::string text_;  // between two markers; encoded as a whole, since pieces may span its parts
    std::vector<token> out_;
};

constexpr std::string_view role_name(chat_role role) {
    switch (role) {
        case chat_role::system:
            return "system";
        case chat_role::user:
            return "user";
        case chat_role::assistant:
            return "assistant";
        case chat_role::tool:
            return "tool";
    }
    return {};
}

template <class Writer>
void open_message(Writer& out, const chat_layout& layout, chat_role role, std::string_view name) {
    out.marker(role == chat_role::user ? layout.user : role == chat_role::assistant ? layout.assistant : layout.system);
    out.text(name.empty() ? role_name(role) : name);
    out.marker(layout.middle);
}

template <class Writer>
void write_message(Writer& out, const chat_layout& layout, const chat_message& message) {
    if (!message.calls.empty() && message.role != chat_role::assistant) {
        throw error(errc::argument, "chat", "only the assistant calls tools");
    }
    if (message.call_id.empty() == (message.role == chat_role::tool)) {
        throw error(errc::argument, "chat", "a tool's result names the call that it answers, and nothing else does");
    }
    open_message(out, layout, message.role, message.name);
    if (message.role == chat_role::tool) {
        out.text("## Return of ");
        out.text(message.call_id);
        out.text("\n");
    }
    out.text(message.content);
    if (!message.calls.empty()) {
        out.marker(layout.calls_begin);
        for (const chat_call& call : message.calls) {
            out.marker(layout.call_begin);
            out.text(call.id);
            out.marker(layout.call_arguments);
            out.text(call.arguments);
            out.marker(layout.call_end);
        }
        out.marker(layout.calls_end);
    }
    out.marker(layout.end);
}

template <class Writer>
auto write_chat(Writer out, const chat_layout& layout, std::span<const chat_message> messages, chat_options options) {
    if (options.after_answer) out.marker(layout.end);
    if (!options.tools.empty()) {
        open_message(out, layout, chat_role::system, "tool_declare");
        out.text(options.tools);
        out.marker(layout.end);
    }
    for (const chat_message& message : messages) write_message(out, layout, message);
    if (options.answer) open_message(out, layout, chat_role::assistant, {});
    return out.finish();
}

}  // namespace detail

/// The tokens of a conversation, or of its next messages. Nothing is added that is not asked for: no default system
/// message, no bos. Text within messages never becomes a control token. Throws errc::unsupported if the vocabulary
/// lacks a marker that is needed, errc::argument for a message that cannot be.
[[nodiscard]] inline std::vector<token> chat_tokens(const tokenizer& vocabulary, std::span<const chat_message> messages,
                                                    const chat_options& options = {},
                                                    const chat_layout& layout = im_layout) {
    return detail::write_chat(detail::chat_token_writer(vocabulary), layout, messages, options);
}

/// The same as text, for people to read. Encoding it is not the way to tokens: it no longer tells a marker from a text
/// that looks like one.
[[nodiscard]] inline std::string chat_text(std::span<const chat_message> messages, const chat_options& options = {},
                                           const chat_layout& layout = im_layout) {
    return detail::write_chat(detail::chat_text_writer(), layout, messages, options);
}

/// Whether the vocabulary has what a conversation without tools needs.
[[nodiscard]] inline bool can_chat(const tokenizer& vocabulary, const chat_layout& layout = im_layout) {
    for (const auto marker : {layout.system, layout.user, layout.assistant, layout.middle, layout.end}) {
        if (!vocabulary.find(marker)) return false;
    }
    return true;
}

}  // namespace keel::inline KEEL_ABI
