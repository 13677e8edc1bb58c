// SPDX-License-Identifier: MIT
#pragma once

namespace keel::cuda_launch::detail {

/// f.template operator()<D>() for the D of `Dims`, those that there are kernels for, that head_dim is; or `otherwise`.
template <int... Dims, class F, class Result>
Result visit_head_dim(int head_dim, F&& f, Result otherwise) {
    Result result = otherwise;
    static_cast<void>(((head_dim == Dims && (result = f.template operator()<Dims>(), true)) || ...));
    return result;
}

}  // namespace keel::cuda_launch::detail
