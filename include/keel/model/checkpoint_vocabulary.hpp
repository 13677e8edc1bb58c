// SPDX-License-Identifier: MIT
//
// The tokenizer of a Hugging Face checkpoint as GGUF keys. The ordinary tokens come from tiktoken.model (see
// text/tiktoken.hpp); the named ones, the roles of some of them and the chat template from the JSON files beside it:
//
//     tokenizer_config.json   added_tokens_decoder {"ID": {"content": NAME}}, bos_token, eos_token, pad_token,
//     unk_token
//                             (a name or {"content": NAME}), add_bos_token, chat_template
//     generation_config.json  eos_token_id, one or several: what ends an answer, often not the eos_token
//     chat_template.jinja     newer checkpoints have the template here
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>
#include <keel/core/view.hpp>
#include <keel/io/gguf_writer.hpp>
#include <keel/io/json.hpp>
#include <keel/io/mapped_file.hpp>
#include <keel/model/checkpoint_config.hpp>

namespace keel::inline KEEL_ABI {
namespace detail {

/// Collects the tokenizer of one checkpoint.
class checkpoint_vocabulary {
public:
    checkpoint_vocabulary(const std::filesystem::path& folder, std::span<const std::string> ordinary, index size)
        : file_((folder / "tokenizer_config.json").string()),
          document_(json::parse_file(file_)),
          keys_(document_, file_),
          tokens_(ordinary.begin(), ordinary.end()),
          types_(ordinary.size(), normal) {
        if (!document_.is_object()) throw error(errc::format, file_, "is not a JSON object");
        if (static_cast<index>(ordinary.size()) > size) {
            throw error(
                errc::format, (folder / "tiktoken.model").string(),
                "has " + std::to_string(ordinary.size()) + " tokens, more than the vocab_size " + std::to_string(size));
        }
        name_added(size);
    }

    checkpoint_vocabulary(const checkpoint_vocabulary&) = delete;  // keys_ refers to document_
    checkpoint_vocabulary& operator=(const checkpoint_vocabulary&) = delete;

    [[nodiscard]] const std::vector<std::string>& tokens() const { return tokens_; }
    [[nodiscard]] const std::vector<std::int32_t>& types() const { return types_; }
    [[nodiscard]] const json_keys& keys() const { return keys_; }

    /// The id of the token that has a role such as "bos_token".
    [[nodiscard]] std::optional<index> role(std::string_view key) const {
        const json* value = keys_.find(key);
        if (value == nullptr) return std::nullopt;
        if (value->is_object()) value = &value->require("content");
        if (!value->is_string()) keys_.fail(key, "is not the name of a token");
        const auto found = added_.find(std::string(value->as_string()));
        if (found == added_.end()) keys_.fail(key, "names a token that is not in added_tokens_decoder");
        return found->second;
    }

private:
    static constexpr std::int32_t normal = 1, control = 3, unused = 5;  // tokenizer.ggml.token_type
    static constexpr index reserved = 256;  // ids behind the ordinary ones that Kimi's tokenizer names all

    /// Ids from the ordinary ones to `size`. All that have a name are structure, whether marked "special" or not.
    void name_added(index size) {
        const auto first = static_cast<index>(tokens_.size());
        for (index id = first; id < size; ++id) {
            const bool named = id < first + reserved;
            tokens_.push_back((named ? "<|reserved_token_" : "[PAD") + std::to_string(id) + (named ? "|>" : "]"));
            types_.push_back(named ? control : unused);
        }
        const json* const decoder = keys_.find("added_tokens_decoder");
        if (decoder == nullptr) return;
        if (!decoder->is_object()) keys_.fail("added_tokens_decoder", "is not an object");
        for (const json::member& added : decoder->as_object()) {
            const std::string& key = added.key;
            const json& entry = added.value;
            const auto refuse = [&](const std::string& what) {
                keys_.fail("added_tokens_decoder", "has the entry " + key + ", " + what);
            };
            index id = -1;
            const auto [end, failure] = std::from_chars(key.data(), key.data() + key.size(), id);
            if (failure != std::errc{} || end != key.data() + key.size()) refuse("which is not a token id");
            if (id < first || id >= size) {
                refuse("outside of " + std::to_string(first) + " to " + std::to_string(size - 1));
            }
            const json* const content = entry.is_object() ? entry.find("content") : nullptr;
            if (content == nullptr || !content->is_string() || content->as_string().empty()) {
                refuse("which has no content");
            }
            const std::string name(content->as_string());
            if (!added_.emplace(name, id).second) refuse("whose content \"" + name + "\" another one has");
            tokens_[static_cast<std::size_t>(id)] = name;
            types_[static_cast<std::size_t>(id)] = control;
        }
    }

    std::string file_;
    json document_;
    json_keys keys_;
    std::vector<std::string> tokens_;
    std::vector<std::int32_t> types_;
    std::map<std::string, index> added_;
};

/// eos_token_id of a JSON file: nothing, one or several.
inline std::vector<index> answer_ends(const json_keys& keys, index size) {
    const json* const value = keys.find("eos_token_id");
    if (value == nullptr) return {};
    if (value->is_array()) return keys.numbers("eos_token_id", 0, size - 1);
    return {keys.number("eos_token_id", 0, size - 1)};
}

inline std::string chat_template_of(const std::filesystem::path& folder, const json_keys& keys) {
    const auto own_file = folder / "chat_template.jinja";
    if (std::error_code ignored; std::filesystem::exists(own_file, ignored)) {
        const mapped_file file(own_file);
        return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
    }
    const json* const value = keys.find("chat_template");
    if (value == nullptr || !value->is_array()) return std::string(keys.text("chat_template").value_or(""));
    for (const json& entry : value->as_array()) {  // several, by name
        if (entry.require("name").as_string() == "default") return std::string(entry.require("template").as_string());
    }
    keys.fail("chat_template", "has no entry named default");
}

}  // namespace detail

/// Writes the tokenizer's keys. `tokens` and `merges` are those of tiktoken.model, `settings` are the checkpoint's
/// config.json, `size` is its vocab_size. Throws errc::file for a missing tokenizer_config.json, errc::format, naming
/// file and key, for what cannot be.
inline void write_vocabulary(gguf_writer& to, const std::filesystem::path& folder, const detail::json_keys& settings,
                             index size, std::span<const std::string> tokens, std::span<const std::string> merges) {
    const detail::checkpoint_vocabulary all(folder, tokens, size);
    to.set("tokenizer.ggml.model", "gpt2");
    to.set("tokenizer.ggml.pre", "kimi-k2");
    to.set_array("tokenizer.ggml.tokens", all.tokens());
    to.set_array("tokenizer.ggml.token_type", all.types());
    to.set_array("tokenizer.ggml.merges", merges);

    const auto set_id = [&](std::string_view key, std::optional<index> id) {
        if (id) to.set("tokenizer.ggml." + std::string(key) + "_token_id", static_cast<std::uint32_t>(*id));
    };
    const auto configured = [&](std::string_view key) -> std::optional<index> {
        if (settings.find(key) == nullptr) return std::nullopt;
        return settings.number(key, 0, size - 1);
    };
    const auto role = [&](std::string_view name, std::optional<index> otherwise) {
        const auto id = all.role(name);
        return id ? id : otherwise;
    };

    auto ends = detail::answer_ends(settings, size);
    const auto generation = folder / "generation_config.json";
    if (std::error_code ignored; std::filesystem::exists(generation, ignored)) {
        const json document = json::parse_file(generation);
        if (!document.is_object()) throw error(errc::format, generation.string(), "is not a JSON object");
        const auto more = detail::answer_ends({document, generation.string()}, size);
        ends.insert(ends.begin(), more.begin(), more.end());
    }
    const auto eos = role("eos_token", ends.empty() ? std::nullopt : std::optional<index>(ends.front()));
    set_id("bos", role("bos_token", configured("bos_token_id")));
    set_id("eos", eos);
    const auto other = std::find_if(ends.begin(), ends.end(), [&](index id) { return id != eos; });
    if (other != ends.end()) set_id("eot", *other);
    set_id("padding", role("pad_token", configured("pad_token_id")));
    set_id("unknown", role("unk_token", std::nullopt));
    if (const auto add = all.keys().flag("add_bos_token")) to.set("tokenizer.ggml.add_bos_token", *add);
    if (const auto text = detail::chat_template_of(folder, all.keys()); !text.empty()) {
        to.set("tokenizer.chat_template", text);
    }
}

}  // namespace keel::inline KEEL_ABI
