// SPDX-License-Identifier: MIT
//
// The kernels for many rows: what cuda.hpp (host compiler) sees of them, with the conventions of launch.hpp. Every
// function only enqueues work on `stream` and returns the error of doing so. f32 activations and their strides are
// multiples of 16 bytes.
#pragma once

#include <cstddef>

#include <cuda_runtime_api.h>

#include <keel/backend/cuda/launch.hpp>

namespace keel::cuda_launch {

/// (n, heads, width) or (n, columns) in device memory; the last dimension is contiguous.
template <class T>
struct activations {
    T* data = nullptr;
    long long row = 0, head = 0;  ///< strides in elements
};

/// Kimi Delta Attention in chunks of 16 tokens; the formula is that of keel::kda_args. head_dim is 32, 64 or 128.
/// Products are of half-width factors, all bounded by 1 but the state and v, whose magnitude must stay below 65504;
/// sums and the state are f32.
struct kda_chunk_args {
    activations<const float> q, k, v, log_decay;  ///< (n, H, D)
    activations<const float> beta;                ///< (n, H); any alignment
    activations<float> out;                       ///< (n, H, D)
    const segment* segments = nullptr;
    int segment_count = 0;
    int longest = 0;  ///< rows of the longest segment
    int layer = 0;
    memory layout{};
    void* workspace = nullptr;
    std::size_t workspace_bytes = 0;  ///< at least kda_chunk_bytes(.., 16); more lets more chunks run side by side
};

/// Workspace with which `longest` rows of each segment are prepared at once.
std::size_t kda_chunk_bytes(int segment_count, int heads, int head_dim, int longest);
cudaError_t kda_chunk(const kda_chunk_args& args, cudaStream_t stream);

/// With a weight, the input of products is rms_norm(x; weight).
struct input_norm {
    const float* weight = nullptr;
    float epsilon = 0;
};

/// out = W x or += W x for several matrices with one input, rounded to halves with a power of two per row, to two
/// halves where weights are f16 or bf16, and not at all where they are f32; sums are f32. With heads > 1, every matrix,
/// not of f32, holds that many, head h takes x + h * x_head to out + h * out_head, and out_row is heads * out_head.
struct products_args {
    const float* x = nullptr;  ///< (rows, columns); columns even
    long long x_row = 0;
    int rows = 0, columns = 0;
    long long x_head = 0;
    int heads = 1;
    input_norm norm{};
    int count = 0;
    product list[matvec_args::most];
    void* workspace = nullptr;  ///< products_bytes(rows * heads, columns), on 256 bytes
};
std::size_t products_bytes(int rows, int columns);
cudaError_t products(const products_args& args, cudaStream_t stream);

/// Networks for many rows. The sum over chosen ones is over slots in order, so that it is the same on every run. `gate`
/// and `up` must have the same type, gate.columns is even. With a choice there may be one more network, `shared`, for
/// every row.
struct feed_forward_args : networks {
    matrix shared_gate{}, shared_up{}, shared_down{};
    void* workspace = nullptr;  ///< feed_forward_bytes(..), on 256 bytes

    /// Whether there is a shared network that differs from an expert's in its weights only.
    bool shared_like_others() const {
        const auto like = [](const matrix& a, const matrix& b) {
            return a.type == b.type && a.rows == b.rows && a.columns == b.columns;
        };
        return shared_gate.data != nullptr && like(shared_gate, gate) && like(shared_up, up) && like(shared_down, down);
    }
};
/// `experts` is 0 for one network without a choice; `planes` is 2 if any weights are f16 or bf16, else 1.
std::size_t feed_forward_bytes(int rows, int k, int experts, int hidden, int width, int planes);
cudaError_t feed_forward(const feed_forward_args& args, cudaStream_t stream);

/// Causal attention with keys and values of every head expanded from the latent cache; the formula is that of
/// keel::expanded_attend_args. Products are of halves; scores, softmax and sums are f32. Keys are expanded in rounds
/// of as many positions as the workspace holds, with a running maximum and sum per row in between.
/// N, P, V and R are multiples of 8, N + P at most 192, V at most 128.
struct expanded_attend_args {
    activations<const float> q;  ///< (n, H, N + P)
    activations<float> out;      ///< (n, H, V)
    matrix key_up{};             ///< count H of (R, N)
    matrix value_up{};           ///< count H of (V, R)
    float scale = 0;
    const segment* segments = nullptr;  ///< in HOST memory; their block tables are on the device
    int segment_count = 0;
    int layer = 0;
    memory layout{};
    void* workspace = nullptr;  ///< on 256 bytes
    std::size_t workspace_bytes = 0;
};
/// Workspace for `rows` rows in which `positions` are expanded at once; 256 positions are the least.
std::size_t expanded_attend_bytes(int rows, int positions, int heads, int latent_width, int rank, int key, int value);
cudaError_t expanded_attend(const expanded_attend_args& args, cudaStream_t stream);

}  // namespace keel::cuda_launch
