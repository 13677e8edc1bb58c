// SPDX-License-Identifier: MIT
//
// The compiler's header of vector instructions, if there are some. Until version 13 GCC warns that its own AVX-512
// functions use a value without setting it (PR 105593); it must hear that this is meant where they are defined.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif
