// SPDX-License-Identifier: MIT
//
// Catch2 under one name, be it version 2 or 3. Tests use only what both have.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
