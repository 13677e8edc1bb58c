// SPDX-License-Identifier: MIT
#pragma once

#include <initializer_list>

#include <keel/backend/concept.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

/// The way into every sub-layer: products of the normed input. In one go where the backend can.
template <backend B>
void project(B& b, view<const float, 2> x, view<const float, 1> norm, float epsilon,
             std::initializer_list<linear<typename B::matrix>> products) {
    if constexpr (requires { b.norm_matmul(x, norm, epsilon, products); }) {
        b.norm_matmul(x, norm, epsilon, products);
    } else {
        const arena::scope scope(b.workspace());
        const auto normed = b.workspace().template take<float>(x.extent[0], x.extent[1]);
        b.rms_norm({x, norm, epsilon, normed});
        b.matmul(normed, products);
    }
}

}  // namespace keel::inline KEEL_ABI
