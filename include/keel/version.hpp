// SPDX-License-Identifier: MIT
#pragma once

// The version, in one place: CMake reads these three numbers from this file.
#define KEEL_VERSION_MAJOR 0
#define KEEL_VERSION_MINOR 1
#define KEEL_VERSION_PATCH 0
#define KEEL_VERSION "0.1.0"
