// SPDX-License-Identifier: MIT
//
// Which instruction sets the processor has, by their names in KEEL_ISA (compiler.hpp), for programs that carry code for
// several. Must be compiled for the least of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <keel/core/compiler.hpp>
#include <keel/core/error.hpp>

namespace keel::inline KEEL_ABI {

namespace detail {

#if defined(__x86_64__) && defined(__GNUC__)

struct cpuid_registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

/// All zero for a leaf that the processor does not know.
inline cpuid_registers cpuid(unsigned leaf, unsigned subleaf) {
    cpuid_registers r;
    if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) return {};
    return r;
}

/// The registers that the operating system saves, as bits of XCR0.
inline std::uint64_t saved_registers() {
    if ((cpuid(1, 0).c >> 27 & 1) == 0) return 0;
    std::uint32_t low = 0, high = 0;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return std::uint64_t{high} << 32 | low;
}

constexpr bool has_bits(std::uint64_t value, std::initializer_list<int> bits) {
    for (const int bit : bits) {
        if ((value >> bit & 1) == 0) return false;
    }
    return true;
}

/// What the compilers call x86-64-v3.
inline bool has_avx2() {
    return has_bits(saved_registers(), {1, 2}) &&
           has_bits(cpuid(1, 0).c, {12 /* fma */, 22 /* movbe */, 28, 29 /* f16c */}) &&
           has_bits(cpuid(7, 0).b, {3 /* bmi */, 5 /* avx2 */, 8 /* bmi2 */}) &&
           has_bits(cpuid(0x80000001, 0).c, {5 /* lzcnt */});
}

/// x86-64-v4 and byte products.
inline bool has_avx512() {
    return has_avx2() && has_bits(saved_registers(), {5, 6, 7}) &&
           has_bits(cpuid(7, 0).b, {16 /* f */, 17 /* dq */, 28 /* cd */, 30 /* bw */, 31 /* vl */}) &&
           has_bits(cpuid(7, 0).c, {11 /* vnni */});
}

inline bool has_avx512bf16() { return has_avx512() && has_bits(cpuid(7, 1).a, {5}); }

inline bool has_amx() {
    return has_avx512bf16() && has_bits(saved_registers(), {17, 18}) &&
           has_bits(cpuid(7, 0).d, {22 /* bf16 */, 24 /* tile */, 25 /* int8 */});
}

#else

inline bool has_avx2() { return false; }
inline bool has_avx512() { return false; }
inline bool has_avx512bf16() { return false; }
inline bool has_amx() { return false; }

#endif

struct instruction_set {
    std::string_view name;
    bool (*runs)();
};
inline constexpr instruction_set instruction_sets[] = {
    {"amx", has_amx}, {"avx512bf16", has_avx512bf16}, {"avx512", has_avx512}, {"avx2", has_avx2}, {"portable", [] {
                                                                                                       return true;
                                                                                                   }}};

}  // namespace detail

/// Whether processor and operating system run code that was compiled for this set; false for an unknown name.
inline bool runs_instruction_set(std::string_view name) {
    for (const auto& set : detail::instruction_sets) {
        if (set.name == name) return set.runs();
    }
    return false;
}

/// Of the sets that a program carries, best first, each with a member `name`: the one called `wanted`, or the first
/// that runs here if that is empty. Throws errc::unsupported for one that is not carried or does not run here.
template <class Set, std::size_t N>
const Set& choose_instruction_set(const Set (&carried)[N], std::string_view wanted) {
    std::string names;
    for (const Set& set : carried) {
        names.append(names.empty() ? "" : ", ").append(set.name);
        const bool runs = runs_instruction_set(set.name);
        if (wanted.empty() ? runs : set.name == wanted && runs) return set;
        if (set.name == wanted) throw error(errc::unsupported, wanted, "is not an instruction set of this processor");
    }
    if (wanted.empty()) throw error(errc::unsupported, "this processor", "has none of the instruction sets " + names);
    throw error(errc::unsupported, wanted, "is not among the instruction sets of this program: " + names);
}

}  // namespace keel::inline KEEL_ABI
