// SPDX-License-Identifier: MIT
//
// Weights from a mapped file to the device: through pinned memory, two pieces in flight, repacked there to the records
// of launch.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <cuda_runtime_api.h>

#include <keel/backend/cuda/launch.hpp>
#include <keel/backend/cuda/memory.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/dtype.hpp>
#include <keel/core/error.hpp>
#include <keel/core/quant.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// `count` matrices on the device. Copies share the memory.
struct cuda_matrix {
    cuda_launch::matrix on_device{};
    std::shared_ptr<const cuda_buffer> memory;
};

namespace detail {

/// How a type of GGUF is kept.
constexpr cuda_launch::layout layout_for(dtype type) {
    switch (type) {
        case dtype::f32:
            return cuda_launch::layout::f32;
        case dtype::f16:
            return cuda_launch::layout::f16;
        case dtype::bf16:
            return cuda_launch::layout::bf16;
        case dtype::q8_0:
            return cuda_launch::layout::q8_0;
        case dtype::q4_k:
            return cuda_launch::layout::q4_k;
        case dtype::q5_k:
            return cuda_launch::layout::q5_k;
        case dtype::q6_k:
            return cuda_launch::layout::q6_k;
        default:
            return cuda_launch::layout::wide;
    }
}

/// Bytes of a record of `columns` elements.
constexpr index record_bytes(cuda_launch::layout as, index columns) {
    const index units = (columns + 31) / 32;
    const auto planes = [&]() -> index {
        switch (as) {
            case cuda_launch::layout::f32:
                return units * 128;
            case cuda_launch::layout::f16:
            case cuda_launch::layout::bf16:
                return units * 64;
            case cuda_launch::layout::q8_0:
                return units * 34;
            case cuda_launch::layout::q4_k:
                return units * 18 + units / 8 * 4;
            case cuda_launch::layout::q5_k:
                return units * 22 + units / 8 * 4;
            case cuda_launch::layout::q6_k:
                return units * 26 + units / 8 * 2;
            case cuda_launch::layout::wide:
                return units * 48;
        }
        return 0;
    };
    return (planes() + 15) / 16 * 16;
}

}  // namespace detail

/// Brings matrices to a device. One thread at a time.
class cuda_uploader {
public:
    explicit cuda_uploader(std::shared_ptr<cuda_device> to) : to_(std::move(to)) {
        for (slot& s : slots_) {
            s.host = pinned_memory(piece_bytes);
            s.raw = cuda_buffer(to_, piece_bytes);
        }
    }
    ~cuda_uploader() { cudaStreamSynchronize(to_->stream()); }

    /// Throws errc::unsupported for a matrix beyond what kernels can address, errc::capacity.
    [[nodiscard]] cuda_matrix upload(const matrix_view& from) {
        constexpr index most = std::numeric_limits<int>::max();
        const cuda_launch::layout as = detail::layout_for(from.type);
        if (from.count > most || from.rows > most || from.columns > most / 8 || from.row_bytes() > piece_bytes) {
            throw error(errc::unsupported, "matrix of " + std::to_string(from.columns) + " columns",
                        "too wide for the GPU's kernels");
        }
        const index record = detail::record_bytes(as, from.columns);
        const index rows = from.count * from.rows;
        if (as == cuda_launch::layout::wide) {
            to_->note(std::string(info(from.type).name) +
                      " is kept as 8-bit codes, 12 bits a weight: it has no kernels of its own");
        }
        auto memory = std::make_shared<const cuda_buffer>(to_, rows * record);
        const index rows_of_piece = std::max<index>(piece_bytes / std::max<index>(from.row_bytes(), 1), 1);
        for (index first = 0; first < rows; first += rows_of_piece) {
            const index n = std::min(rows_of_piece, rows - first);
            slot& s = slots_[next_++ % 2];
            s.free.wait();
            copy(s.host.data(), from.data + first * from.row_bytes(), n * from.row_bytes());
            check(cudaMemcpyAsync(s.raw.data(), s.host.data(), static_cast<std::size_t>(n * from.row_bytes()),
                                  cudaMemcpyHostToDevice, to_->stream()));
            check(cuda_launch::repack(
                {reinterpret_cast<const unsigned char*>(s.raw.data()),
                 reinterpret_cast<unsigned char*>(memory->data() + first * record), static_cast<int>(from.type), as,
                 static_cast<int>(from.columns), static_cast<int>(record), n},
                to_->stream()));
            s.free.record(to_->stream());
        }
        return {{reinterpret_cast<const unsigned char*>(memory->data()), as, static_cast<int>(from.count),
                 static_cast<int>(from.rows), static_cast<int>(from.columns), static_cast<int>(record)},
                std::move(memory)};
    }

private:
    static constexpr index piece_bytes = index{32} << 20;

    /// A piece on its way.
    struct slot {
        pinned_memory host;
        cuda_buffer raw;
        cuda_event free;  ///< behind the last use of the piece
    };

    static void check(cudaError_t e) { detail::check(e, "weights"); }

    /// One thread alone does not copy as fast as the bus to the device, least of all from pages that are touched for
    /// the first time.
    static void copy(std::byte* to, const std::byte* from, index bytes) {
        constexpr index worth_a_thread = index{2} << 20;
        const index parts =
            std::min<index>(bytes / worth_a_thread + 1, std::max(1u, std::thread::hardware_concurrency()));
        std::vector<std::jthread> helpers;
        for (index i = 1; i < parts; ++i) {
            const index first = bytes / parts * i, last = i + 1 == parts ? bytes : bytes / parts * (i + 1);
            helpers.emplace_back(
                [=] { std::memcpy(to + first, from + first, static_cast<std::size_t>(last - first)); });
        }
        std::memcpy(to, from, static_cast<std::size_t>(bytes / parts));
    }

    std::shared_ptr<cuda_device> to_;
    slot slots_[2];
    unsigned next_ = 0;
};

}  // namespace keel::inline KEEL_ABI
