// SPDX-License-Identifier: MIT
//
// What the commands need of a model, whatever backend and instruction set its code was compiled for. Only types of the
// standard library cross this border, since the types of keel carry the instruction set in their names.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

/// stage, done, total -> go on?
using progress = std::function<bool(std::string_view, std::uint64_t, std::uint64_t)>;

struct model_options {
    std::string path;  ///< empty: the demonstration model inside the executable
    std::string backend = "cpu";
    std::string precision = "fast";
    int threads = 0;
    bool interleave = false;
    progress tell = {};
};

struct sampling {
    float temperature = 0.7f;
    int top_k = 0;
    float top_p = 0.95f;
    float min_p = 0;
    std::uint64_t seed = 0;
};

/// A keel session with its sampler and its text stream.
class session {
public:
    using each_row = std::function<void(std::int64_t position, std::span<const float> logits)>;

    virtual ~session() = default;
    virtual void feed(std::span<const std::int32_t> tokens, const progress& tell = {}, const each_row& each = {}) = 0;
    virtual std::span<const float> logits() = 0;
    virtual std::optional<std::int32_t> next() = 0;
    virtual std::int64_t position() const = 0;
    virtual std::int64_t context() const = 0;
    virtual std::span<const std::int32_t> tokens() const = 0;
    virtual std::unique_ptr<session> fork() const = 0;
    /// Forgets the tokens behind the first `position`; answers how many will have to run again.
    virtual std::int64_t rewind(std::int64_t position) = 0;
    virtual void save(const std::string& path) = 0;
    /// The characters that are complete with this token, and those that never will be.
    virtual std::string_view show(std::int32_t token) = 0;
    virtual std::string_view show_rest() = 0;
};

/// A message of a conversation.
struct message {
    enum class author { system, user } by;
    std::string text;
};

/// A keel engine.
class model {
public:
    virtual ~model() = default;
    /// `beyond_training`: the context may be longer than what the model was trained for.
    virtual std::unique_ptr<session> start(std::int64_t context, const sampling& how,
                                           bool beyond_training = false) const = 0;
    /// A session that was saved.
    virtual std::unique_ptr<session> resume(const std::string& path, std::int64_t context,
                                            const sampling& how) const = 0;
    /// The control token of that name.
    virtual std::optional<std::int32_t> find(std::string_view name) const = 0;
    virtual std::vector<std::int32_t> encode(std::string_view text, bool special) const = 0;
    virtual std::string decode(std::span<const std::int32_t> tokens) const = 0;
    /// The token that begins every document, if the model wants one.
    virtual std::optional<std::int32_t> document_start() const = 0;
    /// The tokens of messages and of the head of the answer. `after_answer`: the session ends with an answer.
    virtual std::vector<std::int32_t> turn(std::span<const message> messages, bool after_answer) const = 0;
    /// Bytes that a token reads from memory at this position: active weights, state twice, cache.
    virtual double bytes_per_token(std::int64_t position) const = 0;
};

/// Bytes that a model and one session take, see keel::memory_plan.
struct memory {
    std::int64_t context;
    std::int64_t weights, tokenizer, workspace;                       // of the model
    std::int64_t state, cache_per_token, cache, tokens, checkpoints;  // of the session
    std::int64_t total;
};

/// What there is of each backend, and for the CPU of each instruction set.
struct backend_code {
    std::unique_ptr<model> (*load)(const model_options& options);
    memory (*plan)(const model_options& options, std::int64_t context);
};

/// Throws std::exception. The messages name what is wrong.
std::unique_ptr<model> load(const model_options& options);

/// Reads no weights. A context of 0 is the engine's default. Throws as load() does.
memory plan(const model_options& options, std::int64_t context);

/// The demonstration model inside the executable.
std::span<const std::byte> demo_model();

}  // namespace tool
