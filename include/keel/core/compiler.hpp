// SPDX-License-Identifier: MIT
//
// The few macros of keel. Everything else is a function, a type or a concept.
#pragma once

#include <keel/version.hpp>

// Functions that run on the device as well as on the host.
#if defined(__CUDACC__)
#define KEEL_HD __host__ __device__
#else
#define KEEL_HD
#endif

// The instruction set that the translation unit is compiled for. It is part of the namespace: two translation units
// with different flags then never share an inline function, so that a program may carry code for several processors.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define KEEL_ISA amx
#elif defined(__AVX512BF16__)
#define KEEL_ISA avx512bf16
#else
#define KEEL_ISA avx512
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KEEL_ISA avx2
#else
#define KEEL_ISA portable
#endif

// Intel's matrix unit; a process must ask for it (cpu/amx.hpp), in Linux's way.
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define KEEL_AMX
#endif

// The name of a macro's value, such as "avx2" for KEEL_TEXT(KEEL_ISA).
#define KEEL_TEXT_(value) #value
#define KEEL_TEXT(value) KEEL_TEXT_(value)

#define KEEL_JOIN_(major, minor, isa) v##major##_##minor##_##isa
#define KEEL_JOIN(major, minor, isa) KEEL_JOIN_(major, minor, isa)

// Use: namespace keel::inline KEEL_ABI { ... }
#define KEEL_ABI KEEL_JOIN(KEEL_VERSION_MAJOR, KEEL_VERSION_MINOR, KEEL_ISA)
