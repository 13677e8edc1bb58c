// SPDX-License-Identifier: MIT
//
// The roofline of the machine, measured with the instructions that this translation unit is compiled for.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <keel/backend/cpu/intrinsics.hpp>
#include <keel/backend/cpu/threads.hpp>

#include "runner.hpp"

namespace bench {

/// Seconds that every thread together needs for f(share, shares); the best of a few, since a limit is wanted.
template <class F>
double best_seconds(keel::thread_pool& pool, F&& f) {
    double best = 1e30;
    for (int i = 0; i < 7; ++i) {
        const auto begun = std::chrono::steady_clock::now();
        pool.parallel(f);
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
    }
    return best;
}

/// Keeps a result alive without storing it anywhere.
template <class T>
void use(const T& value) {
    asm volatile("" : : "m"(value) : "memory");
}

/// Sums a GiB, each thread its own part, of which it also made the pages.
inline double measure_reading(keel::thread_pool& pool) {
    constexpr std::size_t words = std::size_t{1} << 27;
    const auto memory = std::unique_ptr<std::uint64_t[]>(new std::uint64_t[words]);
    const auto part = [&](int share, int shares) {
        const keel::row_range r = keel::share_of(static_cast<keel::index>(words), share, shares, 512);
        return std::span(memory.get() + r.first, static_cast<std::size_t>(r.count));
    };
    pool.parallel([&](int share, int shares) {
        const auto mine = part(share, shares);
        std::fill(mine.begin(), mine.end(), std::uint64_t{1});
    });
    using lanes [[gnu::vector_size(64)]] = std::uint64_t;
    constexpr std::size_t step = sizeof(lanes) / sizeof(std::uint64_t);
    const double seconds = best_seconds(pool, [&](int share, int shares) {
        const auto mine = part(share, shares);
        lanes sums[4] = {};  // four streams, as many as a processor likes
        const std::size_t quarter = mine.size() / 4 / step * step;
        for (std::size_t i = 0; i < quarter; i += step) {
            for (std::size_t s = 0; s < 4; ++s) {
                lanes x;
                std::memcpy(&x, &mine[s * quarter + i], sizeof(x));
                sums[s] += x;
            }
        }
        use(sums);
    });
    return static_cast<double>(words * sizeof(std::uint64_t)) / seconds;
}

/// The rate of f, which does `per_round` operations a round on independent accumulators.
template <class F>
double measure_rate(keel::thread_pool& pool, double per_round, F&& f) {
    constexpr int rounds = 1 << 20;
    return per_round * rounds * pool.size() / best_seconds(pool, [&](int, int) { f(rounds); });
}

inline double measure_floats(keel::thread_pool& pool) {
#if defined(__AVX512F__)
    constexpr int width = 64;
#elif defined(__AVX__)
    constexpr int width = 32;
#else
    constexpr int width = 16;
#endif
    using floats [[gnu::vector_size(width)]] = float;
    constexpr int lanes = width / 4, accumulators = 10;
    return measure_rate(pool, 2.0 * lanes * accumulators, [](int rounds) {
        floats sums[accumulators] = {};
        floats a = {}, b = {};
        for (int i = 0; i < lanes; ++i) a[i] = b[i] = 0.5f;
        for (int r = 0; r < rounds; ++r) {
            asm volatile("" : "+x"(a));  // not a constant
            for (floats& sum : sums) sum = sum * a + b;
        }
        use(sums);
    });
}

/// Products of bytes, summed in 32 bits.
inline double measure_integers(keel::thread_pool& pool) {
#if defined(__AMX_INT8__) && defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;  // arch_prctl(2)
    ::syscall(SYS_arch_prctl, request_permission, tile_data);
    return measure_rate(pool, 4 * 2.0 * 16 * 16 * 64, [](int rounds) {
        // Static, since GCC believes that the instruction reads no more than the first bytes of it.
        struct shape_of_tiles {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        };
        alignas(64) static constexpr shape_of_tiles shape;
        alignas(64) static constexpr std::int8_t ones[16 * 64] = {1};
        _tile_loadconfig(&shape);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, ones, 64);
        _tile_loadd(5, ones, 64);
        _tile_loadd(6, ones, 64);
        _tile_loadd(7, ones, 64);
        for (int r = 0; r < rounds; ++r) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 5, 6);
            _tile_dpbssd(2, 4, 7);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_release();
    });
#elif defined(__AVX512VNNI__)
    constexpr int accumulators = 10;
    return measure_rate(pool, 2.0 * 64 * accumulators, [](int rounds) {
        __m512i sums[accumulators], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
        for (__m512i& sum : sums) sum = _mm512_setzero_si512();
        for (int r = 0; r < rounds; ++r) {
            asm volatile("" : "+v"(a));
            for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
        }
        use(sums);
    });
#elif defined(__AVX2__)
    constexpr int accumulators = 8;
    return measure_rate(pool, 2.0 * 32 * accumulators, [](int rounds) {
        __m256i sums[accumulators], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(1);
        const __m256i ones = _mm256_set1_epi16(1);
        for (__m256i& sum : sums) sum = _mm256_setzero_si256();
        for (int r = 0; r < rounds; ++r) {
            for (__m256i& sum : sums) {
                asm volatile("" : "+x"(a));  // not the same product for every sum
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
            }
        }
        use(sums);
    });
#else
    (void)pool;
    return 0;
#endif
}

inline limits limits_of(keel::thread_pool& pool) {
    return {.bytes_per_second = measure_reading(pool),
            .integer_operations_per_second = measure_integers(pool),
            .float_operations_per_second = measure_floats(pool)};
}

}  // namespace bench
