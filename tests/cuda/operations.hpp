// SPDX-License-Identifier: MIT
//
// What the tests of the CUDA backend's operations share: a backend that brings arrays to the GPU, random weights of any
// type, how far results may be off.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <keel/backend/cuda.hpp>
#include <keel/backend/reference.hpp>

#include "backend/operands.hpp"

namespace keel::testing {

inline constexpr index workspace_bytes = index{256} << 20;

/// A backend with copies of host arrays on the GPU, which it keeps.
class gpu {
public:
    explicit gpu(precision p) : b(std::make_shared<cuda_device>(backend_options{p, 0, 0}), workspace_bytes) {}

    template <class T, int Rank>
    view<T, Rank> put(view<T, Rank> host) {
        using value = std::remove_const_t<T>;
        buffers_.push_back(b.allocate(host.size() * static_cast<index>(sizeof(T))));
        b.upload(buffers_.back().data(), reinterpret_cast<const std::byte*>(host.data), buffers_.back().size());
        view<T, Rank> there = host;
        there.data = reinterpret_cast<value*>(buffers_.back().data());
        return there;
    }

    template <class T, int Rank>
    std::vector<std::remove_const_t<T>> get(view<T, Rank> from) {
        std::vector<std::remove_const_t<T>> values(static_cast<std::size_t>(from.size()));
        b.download(reinterpret_cast<std::byte*>(values.data()), reinterpret_cast<const std::byte*>(from.data),
                   from.size() * static_cast<index>(sizeof(T)));
        return values;
    }

    /// The sequences' memory on the GPU, where bring_back() fetches it from.
    std::span<const segment> put(sequences& host) {
        segments_.clear();
        addresses_.clear();
        copies_.clear();
        for (const segment& s : host.segments()) {
            segment here = s;
            here.recurrent = mirror(s.recurrent, host.layout().recurrent_bytes());
            std::vector<std::byte*> blocks;
            for (index p = 0; p < s.position + s.rows; p += memory_layout::block_rows) {
                blocks.push_back(mirror(s.blocks[p / memory_layout::block_rows], host.layout().block_bytes()));
            }
            addresses_.push_back(std::move(blocks));
            segments_.push_back(here);
        }
        for (std::size_t i = 0; i < segments_.size(); ++i) segments_[i].blocks = addresses_[i].data();
        return segments_;
    }
    void bring_back() {
        for (const copy& c : copies_) b.download(c.host, c.device, c.bytes);
    }

    cuda b;

private:
    struct copy {
        std::byte *host, *device;
        index bytes;
    };

    std::byte* mirror(std::byte* host, index bytes) {
        if (bytes == 0) return nullptr;
        buffers_.push_back(b.allocate(bytes));
        b.upload(buffers_.back().data(), host, bytes);
        copies_.push_back({host, buffers_.back().data(), bytes});
        return buffers_.back().data();
    }

    std::vector<cuda_buffer> buffers_;
    std::vector<segment> segments_;
    std::vector<std::vector<std::byte*>> addresses_;
    std::vector<copy> copies_;
};

inline reference make_reference() {
    return {std::make_shared<reference::device>(backend_options{precision::exact, 1, 0}), workspace_bytes};
}

/// Random weights of any type: every bit of the codes, scales of about `size`.
class random_matrix {
public:
    random_matrix(dtype type, index count, index rows, index columns, std::uint32_t seed, float size = 0.05f) {
        std::mt19937 engine(seed);
        std::uniform_int_distribution<int> byte(0, 255);
        std::normal_distribution<float> normal(0.0f, size);
        view_ = {nullptr, type, count, rows, columns};
        bytes_.resize(static_cast<std::size_t>(view_.bytes()));
        for (auto& b : bytes_) b = static_cast<std::byte>(byte(engine));
        visit_blocks(type, [&]<class Block>() {
            auto* blocks = reinterpret_cast<Block*>(bytes_.data());
            for (index i = 0; i < view_.bytes() / Block::bytes; ++i) {
                Block& b = blocks[i];
                if constexpr (std::is_same_v<Block, block_f32>) b.value.set(normal(engine));
                if constexpr (std::is_same_v<Block, block_f16>) b.value.set(to_f16(normal(engine)));
                if constexpr (std::is_same_v<Block, block_bf16>) b.value.set(to_bf16(normal(engine)));
                if constexpr (std::is_same_v<Block, block_mxfp4>) b.e = static_cast<std::uint8_t>(120 + i % 4);
                const float scale = Block::elements == 256 ? size / 64 : size / 8;
                if constexpr (requires { b.d; }) b.d.set(to_f16(scale * (1 + normal(engine))));
                if constexpr (requires { b.m; }) b.m.set(to_f16(-3 * scale));
                if constexpr (requires { b.dmin; }) b.dmin.set(to_f16(2 * scale));
            }
        });
        view_.data = bytes_.data();
    }

    operator const matrix_view&() const { return view_; }
    [[nodiscard]] const matrix_view& shape() const { return view_; }

private:
    std::vector<std::byte> bytes_;
    matrix_view view_;
};

inline constexpr dtype all_types[] = {dtype::f32,  dtype::f16,    dtype::bf16,   dtype::q8_0, dtype::q4_0, dtype::q4_1,
                                      dtype::q5_0, dtype::q5_1,   dtype::q2_k,   dtype::q3_k, dtype::q4_k, dtype::q5_k,
                                      dtype::q6_k, dtype::iq4_nl, dtype::iq4_xs, dtype::mxfp4};

inline bool is_plain(dtype type) { return type == dtype::f32 || type == dtype::f16 || type == dtype::bf16; }

/// Many rows are rounded to halves, few to 8 bits where weights are codes of at most 6.
inline double allowed(dtype type, precision p, index rows = 1) {
    if (p == precision::exact) return 2e-6;
    if (rows >= 8) return 2e-3;
    return is_plain(type) || type == dtype::q8_0 ? 2e-6 : 2e-2;
}

}  // namespace keel::testing
