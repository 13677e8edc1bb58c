// SPDX-License-Identifier: MIT
//
// Times of the kernels for many rows, with the shapes of Kimi-Linear-48B-A3B.
//
//   nvcc -std=c++20 -O3 -Iinclude -Itests/cuda -gencode arch=compute_90a,code=sm_90a bench/cuda/prefill_bench.cu
#include <keel/backend/cuda/kda_chunk.cuh>

#include "device_memory.cuh"

namespace launch = keel::cuda_launch;

namespace {

void bench_kda(int sequences, int tokens, int side_by_side) {
    constexpr int heads = 32, dim = 128;
    const int n = sequences * tokens;
    random_source random{5};
    const auto size = static_cast<std::size_t>(n) * heads * dim;
    std::vector<float> some = random.normals(1 << 20, 0.0883f);  // of unit length, about
    std::vector<float> values(size), decays(size), betas(static_cast<std::size_t>(n * heads), 0.5f);
    for (std::size_t i = 0; i < size; ++i) values[i] = some[i * 7 % some.size()];
    for (std::size_t i = 0; i < size; ++i) decays[i] = -std::abs(some[(i * 3 + 1) % some.size()]);
    const device_array<float> q(values), decay(decays), beta(betas);
    for (std::size_t i = 0; i < size; ++i) values[i] = some[i * 5 % some.size()];
    const device_array<float> k(values), v(values);
    const device_array<float> out(size);
    const std::size_t state_size = heads * dim * dim;
    const device_array<float> state(std::vector<float>(static_cast<std::size_t>(sequences) * state_size));
    std::vector<launch::segment> segments;
    for (int s = 0; s < sequences; ++s) {
        segments.push_back({0, reinterpret_cast<unsigned char*>(state.data() + s * state_size), nullptr, s * tokens,
                            tokens});
    }
    const device_array<launch::segment> on_device(segments);
    const device_array<unsigned char> workspace(launch::kda_chunk_bytes(sequences, heads, dim, side_by_side));
    const long long row = heads * dim;
    launch::kda_chunk_args args{{q.data(), row, dim},     {k.data(), row, dim},     {v.data(), row, dim},
                                {decay.data(), row, dim}, {beta.data(), heads, 1}, {out.data(), row, dim}};
    args.segments = on_device.data(), args.segment_count = sequences, args.longest = tokens;
    args.layout.heads = heads, args.layout.head_dim = dim;
    args.workspace = workspace.data(), args.workspace_bytes = workspace.size();
    const double all = milliseconds([&] { check(launch::kda_chunk(args, nullptr), "kda_chunk"); });
    const int chunks = (side_by_side + 15) / 16;
    using factors = launch::detail::kda_factors<dim>;
    const double prepare = milliseconds([&] {
        launch::detail::kda_prepare_kernel<dim>
            <<<dim3(static_cast<unsigned>(chunks), heads, static_cast<unsigned>(sequences)), 64>>>(
                args, 0, static_cast<factors*>(args.workspace));
    });
    std::printf("kda_chunk  B=%d T=%5d, %5d side by side: %.4f ms (preparing %d chunks %.4f ms)\n", sequences, tokens,
                side_by_side, all, chunks, prepare);
}

}  // namespace

int main() {
    bench_kda(1, 2048, 2048);
    bench_kda(1, 2048, 512);
    bench_kda(1, 8192, 8192);
    bench_kda(1, 8192, 2048);
    bench_kda(1, 8192, 1024);
    bench_kda(8, 1024, 1024);
}
