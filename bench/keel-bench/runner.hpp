// SPDX-License-Identifier: MIT
//
// What is measured, whatever backend and instruction set the code under measurement was compiled for. Only types of the
// standard library cross this border, since the types of keel carry the instruction set in their names.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace bench {

struct options {
    std::string model;
    std::string backend = "cpu";
    std::string precision = "fast";
    int threads = 0;  ///< 0: one per physical core
    bool interleave = false;
    std::int64_t context = 0;  ///< 0: as much as the tests need
};

/// A keel session. Feeding ends with the logits of the last token, as generating does.
class session {
public:
    virtual ~session() = default;
    virtual void feed(std::span<const std::int32_t> tokens) = 0;
    /// Leaves the tokens to model::step().
    virtual void append(std::span<const std::int32_t> tokens) = 0;
    /// Makes the session hold these tokens; answers how many had to run through the model.
    virtual std::int64_t sync(std::span<const std::int32_t> tokens) = 0;
    virtual void rewind(std::int64_t position) = 0;
    virtual void save(const std::string& path) = 0;
    [[nodiscard]] virtual std::unique_ptr<session> fork() const = 0;
};

/// A keel engine.
class model {
public:
    virtual ~model() = default;
    /// `replay`: by how many tokens the session can go back without running the model.
    [[nodiscard]] virtual std::unique_ptr<session> start(std::int64_t context, std::int64_t replay = 0) const = 0;
    [[nodiscard]] virtual std::unique_ptr<session> resume(const std::string& path, std::int64_t context) const = 0;
    /// Runs what the sessions were left with, together.
    virtual void step(std::span<const std::unique_ptr<session>> sessions) const = 0;
    [[nodiscard]] virtual std::size_t tokens_of(std::string_view text) const = 0;
    [[nodiscard]] virtual std::string name() const = 0;
    [[nodiscard]] virtual std::int64_t vocabulary() const = 0;
    [[nodiscard]] virtual double bytes() const = 0;
    [[nodiscard]] virtual double parameters() const = 0;
    /// Of the state, which a copy of a session copies: the recurrent one and the logits behind it.
    [[nodiscard]] virtual double state_bytes() const = 0;
    /// Bytes that a token reads from memory at this position: active weights, state twice, cache.
    [[nodiscard]] virtual double bytes_per_token(std::int64_t position) const = 0;
    /// Two for every weight that a token is multiplied with. What attention and recurrence add is left out.
    [[nodiscard]] virtual double operations_per_token() const = 0;
};

/// What the machine can do at most, measured with all threads. Zero: unknown.
struct limits {
    double bytes_per_second = 0;               ///< reading memory
    double integer_operations_per_second = 0;  ///< products of bytes, the unit that the instruction set has for them
    double float_operations_per_second = 0;
};

/// How long one operation takes, alone.
struct operation {
    std::string name;
    double seconds = 0;     ///< median
    double bytes = 0;       ///< that it has to read or write
    double operations = 0;  ///< multiplications and additions
    bool integer = false;   ///< of bytes rather than floats
};
using operation_sink = std::function<void(const operation&)>;

/// Code compiled for one backend and instruction set.
class runner {
public:
    virtual ~runner() = default;
    [[nodiscard]] virtual std::string instruction_set() const = 0;
    [[nodiscard]] virtual int threads() const = 0;
    [[nodiscard]] virtual std::unique_ptr<model> load() const = 0;
    [[nodiscard]] virtual limits measure_limits() const = 0;
    /// limits::bytes_per_second alone, as it is now: it drifts where other machines share the memory.
    [[nodiscard]] virtual double measure_reading() const = 0;
    virtual void measure_operations(const operation_sink& sink) const = 0;
};

/// Throws std::exception. The messages name what is wrong.
std::unique_ptr<runner> make_runner(const options& options);

}  // namespace bench
