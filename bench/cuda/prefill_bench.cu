// SPDX-License-Identifier: MIT
//
// Times of the kernels for many rows, and of the recurrence's step for one row, with the shapes of Kimi-Linear-48B-A3B.
//
//   nvcc -std=c++20 -O3 -Iinclude -Itests/cuda -gencode arch=compute_90a,code=sm_90a bench/cuda/prefill_bench.cu
#include <keel/backend/cuda/feed_forward.cuh>
#include <keel/backend/cuda/flash.cuh>
#include <keel/backend/cuda/kda_chunk.cuh>
#include <keel/backend/cuda/kda_step.cuh>
#include <keel/backend/cuda/products.cuh>

#include "device_matrix.cuh"
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
        segments.push_back(
            {0, reinterpret_cast<unsigned char*>(state.data() + s * state_size), nullptr, s * tokens, tokens});
    }
    const device_array<launch::segment> on_device(segments);
    const device_array<unsigned char> workspace(launch::kda_chunk_bytes(sequences, heads, dim, side_by_side));
    const long long row = heads * dim;
    launch::kda_chunk_args args{{q.data(), row, dim},     {k.data(), row, dim},    {v.data(), row, dim},
                                {decay.data(), row, dim}, {beta.data(), heads, 1}, {out.data(), row, dim}};
    args.segments = on_device.data(), args.segment_count = sequences, args.longest = tokens;
    args.layout.heads = heads, args.layout.head_dim = dim;
    args.workspace = workspace.data(), args.workspace_bytes = workspace.size();
    const double all = milliseconds([&] { check(launch::kda_chunk(args, nullptr), "kda_chunk"); });
    std::printf("kda_chunk  B=%d T=%5d, %5d side by side: %.4f ms\n", sequences, tokens, side_by_side, all);
}

/// What one more step costs in a recorded chain of them; each layer has a state of its own, so that none is in a cache.
void bench_kda_step(int sequences, double copy_rate) {
    constexpr int heads = 32, dim = 128, layers = 64;
    random_source random{6};
    const std::size_t size = static_cast<std::size_t>(sequences) * heads * dim, state_size = heads * dim * dim;
    const device_array<float> q(random.normals(size, 0.0883f)), k(random.normals(size, 0.0883f)),
        v(random.normals(size));
    const device_array<float> decay(std::vector<float>(size, -0.1f)), beta(std::vector<float>(size / dim, 0.5f)),
        out(size);
    const device_array<float> state(static_cast<std::size_t>(sequences) * layers * state_size);
    check(cudaMemset(state.data(), 0, state.size() * sizeof(float)), "state");
    std::vector<launch::segment> segments;
    for (int s = 0; s < sequences; ++s) {
        segments.push_back(
            {0, reinterpret_cast<unsigned char*>(state.data() + s * layers * state_size), nullptr, s, 1});
    }
    const device_array<launch::segment> on_device(segments);
    launch::kda_args args{q.data(), k.data(), v.data(), decay.data(), beta.data()};
    args.q_row = args.k_row = args.v_row = args.decay_row = args.out_row = heads * dim;
    args.q_head = args.k_head = args.v_head = args.decay_head = args.out_head = dim;
    args.beta_row = heads, args.out = out.data(), args.segments = on_device.data(), args.segment_count = sequences;
    args.layout.heads = heads, args.layout.head_dim = dim, args.layout.layer_floats = state_size;
    const auto chain = [&](int steps) {
        cudaStream_t stream = nullptr;
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t recorded = nullptr;
        check(cudaStreamCreate(&stream), "stream");
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording");
        for (args.layer = 0; args.layer < steps; ++args.layer) check(launch::kda_step(args, stream), "kda_step");
        check(cudaStreamEndCapture(stream, &graph), "recording");
        check(cudaGraphInstantiate(&recorded, graph, 0), "recording");
        return milliseconds([&] { check(cudaGraphLaunch(recorded, nullptr), "steps"); });
    };
    const double ms = (chain(layers) - chain(layers / 2)) / (layers / 2);
    const double bytes = 4.0 * static_cast<double>(sequences * 2 * state_size + 5 * size);
    std::printf("kda_step   B=%d: %.2f us, %.0f GB/s, %.0f %% of a copy\n", sequences, ms * 1e3, bytes / ms * 1e-6,
                100 * bytes / ms * 1e-6 / copy_rate);
}

/// GB/s that a copy reads and writes.
double copy_rate() {
    constexpr std::size_t bytes = std::size_t{1} << 30;
    const device_array<unsigned char> from(bytes), to(bytes);
    const double ms = milliseconds(
        [&] { check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, nullptr), "copy"); });
    std::printf("copy       %.0f GB/s read and written\n", 2.0 * static_cast<double>(bytes) / ms * 1e-6);
    return 2.0 * static_cast<double>(bytes) / ms * 1e-6;
}

/// One expert's blocks, or a few rows', repeated: random enough to multiply with, quick to make.
device_matrix weights(keel::dtype type, int count, int rows, int columns, random_source& random) {
    const auto one = random_blocks(type, rows, columns, random);
    device_matrix m = upload_matrix(type, 1, rows, columns, one);
    if (count == 1) return m;
    device_matrix all{m.matrix, device_array<unsigned char>(m.records.size() * static_cast<std::size_t>(count))};
    for (int i = 0; i < count; ++i) {
        check(cudaMemcpy(all.records.data() + static_cast<std::size_t>(i) * m.records.size(), m.records.data(),
                         m.records.size(), cudaMemcpyDeviceToDevice),
              "copy");
    }
    all.matrix.data = all.records.data(), all.matrix.count = count;
    return all;
}

void bench_products(const char* name, int n, int columns, std::vector<int> sizes, keel::dtype type) {
    random_source random{3};
    const device_array<float> x(random.normals(static_cast<std::size_t>(n) * static_cast<std::size_t>(columns)));
    const device_array<unsigned char> workspace(launch::products_bytes(n, columns));
    launch::products_args args{x.data(), columns, n, columns};
    std::vector<device_matrix> matrices;
    std::vector<device_array<float>> outs;
    double work = 0;
    for (const int rows : sizes) {
        matrices.push_back(weights(type, 1, rows, columns, random));
        outs.emplace_back(static_cast<std::size_t>(n) * static_cast<std::size_t>(rows));
        args.list[args.count++] = {matrices.back().matrix, outs.back().data(), rows, 0, 0};
        work += 2.0 * n * columns * rows;
    }
    args.workspace = workspace.data();
    const double ms = milliseconds([&] { check(launch::products(args, nullptr), "products"); });
    const double converting = milliseconds([&] {
        check(launch::detail::prepare_rows({x.data(), columns, 0}, 1, n, columns, {},
                                           launch::detail::prepared(args.workspace, n, columns, 1), nullptr),
              "prepare_rows");
    });
    std::printf("products   %-20s %-5s n=%5d: %.4f ms, %.0f TFLOP/s (converting %.4f ms)\n", name,
                std::string(keel::info(type).name).c_str(), n, ms, work / ms * 1e-9, converting);
}

void bench_feed_forward(int n, int k, int experts, int width, keel::dtype type, keel::dtype down_type) {
    constexpr int hidden = 2304;
    random_source random{4};
    const int count = std::max(experts, 1);
    const auto gate = weights(type, count, width, hidden, random), up = weights(type, count, width, hidden, random);
    const auto down = weights(down_type, count, hidden, width, random);
    const device_array<float> x(random.normals(static_cast<std::size_t>(n) * hidden));
    std::vector<int> chosen;
    for (int i = 0; experts > 0 && i < n; ++i) {
        for (int slot = 0; slot < k; ++slot) {
            int e = 0;
            do {
                e = static_cast<int>(random.bits() % static_cast<std::uint64_t>(experts));
            } while (std::find(chosen.end() - slot, chosen.end(), e) != chosen.end());
            chosen.push_back(e);
        }
    }
    const device_array<int> chosen_device(chosen);
    const device_array<float> weights_device(std::vector<float>(chosen.size(), 0.3f)), out(x.size());
    const device_array<unsigned char> workspace(launch::feed_forward_bytes(n, k, experts, hidden, width, 2));
    launch::feed_forward_args args{{x.data(), hidden, n}};
    if (experts > 0) args.chosen = chosen_device.data(), args.weights = weights_device.data();
    args.chosen_row = args.weights_row = args.k = k;
    args.gate = gate.matrix, args.up = up.matrix, args.down = down.matrix;
    args.out = out.data(), args.out_row = hidden, args.workspace = workspace.data();
    const double ms = milliseconds([&] { check(launch::feed_forward(args, nullptr), "feed_forward"); });
    std::printf("feed_forward n=%5d k=%d X=%3d width=%d %s %s: %.4f ms, %.0f TFLOP/s\n", n, k, experts, width,
                std::string(keel::info(type).name).c_str(), std::string(keel::info(down_type).name).c_str(), ms,
                6.0 * n * k * hidden * width / ms * 1e-9);
}

void bench_attend(int position, int rows, int positions) {
    constexpr int heads = 32, key = 128, position_key = 64, value = 128, rank = 512, width = rank + position_key;
    random_source random{8};
    const auto key_up = weights(keel::dtype::q8_0, heads, rank, key, random);
    const auto value_up = weights(keel::dtype::q4_k, heads, value, rank, random);
    const int length = position + rows;
    std::vector<keel::f16> cache(static_cast<std::size_t>((length + 255) / 256 * 256) * width);
    for (auto& x : cache) x = keel::to_f16(random.uniform() - 0.5f);
    const device_array<keel::f16> memory(cache);
    std::vector<unsigned char*> table;
    for (int i = 0; i < length; i += 256) {
        table.push_back(reinterpret_cast<unsigned char*>(memory.data() + static_cast<std::size_t>(i) * width));
    }
    const device_array<unsigned char*> blocks(table);
    const launch::segment segment{position, nullptr, blocks.data(), 0, rows};
    const device_array<float> q(random.normals(static_cast<std::size_t>(rows) * heads * (key + position_key)));
    const device_array<float> out(static_cast<std::size_t>(rows) * heads * value);
    const device_array<unsigned char> workspace(
        launch::expanded_attend_bytes(rows, positions, heads, width, rank, key, value));
    launch::expanded_attend_args args{{q.data(), heads * (key + position_key), key + position_key},
                                      {out.data(), heads * value, value}};
    args.key_up = key_up.matrix, args.value_up = value_up.matrix, args.scale = 0.07f;
    args.segments = &segment, args.segment_count = 1, args.layout.latent_width = width, args.layout.half = 1;
    args.workspace = workspace.data(), args.workspace_bytes = workspace.size();
    const double ms = milliseconds([&] { check(launch::expanded_attend(args, nullptr), "expanded_attend"); });
    const double pairs = static_cast<double>(rows) * position + 0.5 * rows * rows;
    std::printf("expanded_attend %6d+%5d by %5d: %.4f ms, %.0f TFLOP/s of attention\n", position, rows, positions, ms,
                pairs * heads * 640 / ms * 1e-9);
}

}  // namespace

int main(int count, char** words) {
    using keel::dtype;
    const auto wanted = [&](const char* name) { return count < 2 || std::strstr(name, words[1]) != nullptr; };
    if (wanted("kda")) {
        bench_kda(1, 2048, 2048);
        bench_kda(1, 8192, 8192);
        bench_kda(8, 1024, 1024);
    }
    if (wanted("kda_step")) {
        const double copy = copy_rate();
        for (const int sequences : {1, 8, 64}) bench_kda_step(sequences, copy);
    }
    for (const int n : {2048, 8192}) {
        if (wanted("products")) {
            bench_products("kda q k v", n, 2304, {4096, 4096, 4096}, dtype::q4_k);
            bench_products("kda out", n, 4096, {2304}, dtype::q4_k);
            bench_products("kda out", n, 4096, {2304}, dtype::q6_k);
            bench_products("router", n, 2304, {256}, dtype::f32);
            bench_products("gate up", n, 128, {4096}, dtype::q8_0);
            bench_products("low rank", n, 2304, {128, 128, 32}, dtype::q4_k);
        }
        if (wanted("experts")) {
            bench_feed_forward(n, 8, 256, 1024, dtype::q4_k, dtype::q4_k);
            bench_feed_forward(n, 8, 256, 1024, dtype::q4_k, dtype::q6_k);
        }
        if (wanted("dense")) {
            bench_feed_forward(n, 1, 0, 1024, dtype::q4_k, dtype::q6_k);
            bench_feed_forward(n, 1, 0, 9216, dtype::q4_k, dtype::q6_k);
        }
    }
    if (wanted("attend")) {
        bench_attend(0, 2048, 2048);
        bench_attend(0, 8192, 8192);
        bench_attend(0, 8192, 4096);
        bench_attend(30720, 2048, 4096);
    }
}
