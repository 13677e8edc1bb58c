// SPDX-License-Identifier: MIT
//
// Random weights of every type for the CUDA test and bench programs: blocks of a file, their values, and the records
// on the device.
#pragma once

#include <cstring>

#include <keel/backend/cuda/repack.cuh>
#include <keel/core/quant.hpp>

#include "device_memory.cuh"

struct device_matrix {
    keel::cuda_launch::matrix matrix;
    device_array<unsigned char> records;
};

inline keel::cuda_launch::layout layout_of(keel::dtype type) {
    using keel::dtype, keel::cuda_launch::layout;
    switch (type) {
        case dtype::f32:
            return layout::f32;
        case dtype::f16:
            return layout::f16;
        case dtype::bf16:
            return layout::bf16;
        case dtype::q8_0:
            return layout::q8_0;
        case dtype::q4_k:
            return layout::q4_k;
        case dtype::q5_k:
            return layout::q5_k;
        case dtype::q6_k:
            return layout::q6_k;
        default:
            return layout::wide;
    }
}

inline int record_bytes(keel::cuda_launch::layout as, int columns) {
    using keel::cuda_launch::layout;
    const int u = (columns + 31) / 32, eighths = (u + 7) / 8;
    int bytes = 0;
    switch (as) {
        case layout::f32:
            bytes = 128 * u;
            break;
        case layout::f16:
        case layout::bf16:
            bytes = 64 * u;
            break;
        case layout::q8_0:
            bytes = 34 * u;
            break;
        case layout::q4_k:
            bytes = 18 * u + 4 * eighths;
            break;
        case layout::q5_k:
            bytes = 22 * u + 4 * eighths;
            break;
        case layout::q6_k:
            bytes = 26 * u + 2 * eighths;
            break;
        case layout::wide:
            bytes = 48 * u;
            break;
    }
    return (bytes + 15) / 16 * 16;
}

/// Blocks with random codes, and scales that make the values a few hundredths.
inline std::vector<unsigned char> random_blocks(keel::dtype type, int rows, int columns, random_source& random) {
    const auto row_bytes = static_cast<std::size_t>(keel::row_bytes(type, columns));
    std::vector<unsigned char> blocks(row_bytes * static_cast<std::size_t>(rows));
    for (std::size_t i = 0; i + 8 <= blocks.size(); i += 8) {
        const std::uint64_t bits = random.bits();
        std::memcpy(&blocks[i], &bits, 8);
    }
    const auto size = static_cast<std::size_t>(keel::info(type).block_bytes);
    const auto put = [&](std::size_t at, float x) {
        const keel::f16 h = keel::to_f16(x * (0.5f + random.uniform()));
        std::memcpy(&blocks[at], &h, 2);
    };
    for (std::size_t b = 0; b < blocks.size(); b += size) {
        using keel::dtype;
        switch (type) {
            case dtype::f32: {
                const float x = 0.05f * random.normal();
                std::memcpy(&blocks[b], &x, 4);
                break;
            }
            case dtype::f16:
                put(b, 0.05f * random.normal());
                break;
            case dtype::bf16: {
                const keel::bf16 h = keel::to_bf16(0.05f * random.normal());
                std::memcpy(&blocks[b], &h, 2);
                break;
            }
            case dtype::q4_1:
            case dtype::q5_1:
                put(b, 0.005f), put(b + 2, -0.05f);
                break;
            case dtype::q4_k:
            case dtype::q5_k:
                put(b, 1e-4f), put(b + 2, 1e-3f);
                break;
            case dtype::q6_k:
                put(b + 208, 2e-5f);
                break;
            case dtype::q2_k:
                put(b + 80, 3e-3f), put(b + 82, 3e-3f);
                break;
            case dtype::q3_k:
                put(b + 108, 5e-4f);
                break;
            case dtype::iq4_xs:
                put(b, 2e-5f);
                break;
            case dtype::mxfp4:
                blocks[b] = static_cast<unsigned char>(120 + random.bits() % 3);
                break;
            default:
                put(b, type == dtype::q8_0 || type == dtype::iq4_nl ? 5e-4f : 5e-3f);
        }
    }
    return blocks;
}

inline device_matrix upload_matrix(keel::dtype type, int count, int rows, int columns,
                                   const std::vector<unsigned char>& blocks) {
    const auto as = layout_of(type);
    const int bytes = record_bytes(as, columns);
    const long long all = static_cast<long long>(count) * rows;
    device_matrix m{{nullptr, as, count, rows, columns, bytes},
                    device_array<unsigned char>(static_cast<std::size_t>(all * bytes))};
    m.matrix.data = m.records.data();
    const device_array<unsigned char> from(blocks);
    check(keel::cuda_launch::repack({from.data(), m.records.data(), static_cast<int>(type), as, columns, bytes, all},
                                    nullptr),
          "repack");
    check(cudaDeviceSynchronize(), "repack");
    return m;
}

inline std::vector<float> decode(keel::dtype type, int rows, int columns, const std::vector<unsigned char>& blocks) {
    std::vector<float> values(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
    for (int r = 0; r < rows; ++r) {
        keel::decode_row(
            type,
            reinterpret_cast<const std::byte*>(&blocks[static_cast<std::size_t>(r * keel::row_bytes(type, columns))]),
            &values[static_cast<std::size_t>(r) * static_cast<std::size_t>(columns)], columns);
    }
    return values;
}
