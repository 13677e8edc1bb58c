// SPDX-License-Identifier: MIT
//
// What the backends that compute in host memory share: buffers, weights that refer to a mapped file, the workspace.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <keel/backend/batch.hpp>
#include <keel/backend/concept.hpp>
#include <keel/core/arena.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// Owned host memory, zero when made, aligned for any vector instruction. A value: copying copies the bytes.
class host_buffer {
public:
    host_buffer() = default;

    explicit host_buffer(index bytes) : memory_(take(bytes)), bytes_(bytes) {
        if (bytes != 0) std::memset(data(), 0, static_cast<std::size_t>(bytes));
    }

    host_buffer(const host_buffer& other) : memory_(take(other.bytes_)), bytes_(other.bytes_) {
        if (bytes_ != 0) std::memcpy(data(), other.data(), static_cast<std::size_t>(bytes_));
    }
    host_buffer(host_buffer&& other) noexcept
        : memory_(std::move(other.memory_)), bytes_(std::exchange(other.bytes_, 0)) {}
    host_buffer& operator=(const host_buffer& other) {
        if (bytes_ != other.bytes_) return *this = host_buffer(other);
        if (bytes_ != 0 && this != &other) std::memcpy(data(), other.data(), static_cast<std::size_t>(bytes_));
        return *this;
    }
    host_buffer& operator=(host_buffer&& other) noexcept {
        std::swap(memory_, other.memory_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }

    [[nodiscard]] std::byte* data() const { return memory_.get(); }
    [[nodiscard]] index size() const { return bytes_; }

private:
    static constexpr std::align_val_t alignment{static_cast<std::size_t>(arena::alignment)};
    struct release {
        void operator()(std::byte* p) const { ::operator delete(p, alignment); }
    };

    static std::byte* take(index bytes) {
        if (bytes == 0) return nullptr;
        return static_cast<std::byte*>(::operator new(static_cast<std::size_t>(bytes), alignment));
    }

    std::unique_ptr<std::byte, release> memory_;
    index bytes_ = 0;
};

/// Rows of weights as they lie in a file or in memory, and whatever keeps these bytes alive. Interleaved, `data` is
/// what cpu/interleaved.hpp describes.
struct host_matrix : matrix_view {
    std::shared_ptr<const void> owner;
    bool interleaved = false;
};

/// Memory for weights, not initialised, in large pages where the system has them.
inline std::shared_ptr<std::byte[]> take_large_pages(index bytes) {
    constexpr std::align_val_t alignment{std::size_t{1} << 21};
    auto* const data = static_cast<std::byte*>(::operator new(static_cast<std::size_t>(bytes), alignment));
#if defined(__linux__)
    ::madvise(data, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);  // a hint: refusal does not matter
#endif
    return {data, [](std::byte* p) { ::operator delete(p, alignment); }};
}

/// A small weight (norm, bias, taps), always f32.
struct host_vector {
    std::vector<float> values;

    operator view<const float, 1>() const { return {values.data(), static_cast<index>(values.size())}; }
};

/// The memory side of the backend concept, for backends that compute in host memory.
class host_memory {
public:
    using buffer = host_buffer;
    using vector = host_vector;

    explicit host_memory(index workspace_bytes)
        : memory_(workspace_bytes), workspace_(memory_.data(), memory_.size()) {}

    [[nodiscard]] buffer allocate(index bytes) const { return buffer(bytes); }
    void upload(std::byte* to, const std::byte* from, index bytes) const {
        std::memcpy(to, from, static_cast<std::size_t>(bytes));
    }
    void download(std::byte* to, const std::byte* from, index bytes) const {
        std::memcpy(to, from, static_cast<std::size_t>(bytes));
    }
    [[nodiscard]] arena& workspace() { return workspace_; }

    void keep(const keep_args& a) const {
        for (const segment& s : a.segments) {
            if (s.kept == nullptr) continue;
            const view<float, 3> slots(s.kept, a.layout.kda_layers, s.kept_capacity, a.layout.kept_floats());
            for (index i = std::max<index>(0, s.rows - s.kept_capacity); i < s.rows; ++i) {
                float* to = slots[a.layer][(s.position + i) % s.kept_capacity].data;
                for (const auto& part : {a.q, a.k, a.v, a.decay_low, a.beta}) {
                    to = std::copy_n(part[s.first_row + i].data, part.extent[1], to);
                }
            }
        }
    }

private:
    host_buffer memory_;
    arena workspace_;
};

}  // namespace keel::inline KEEL_ABI
