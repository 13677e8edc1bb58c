// SPDX-License-Identifier: MIT
//
// The kernels for many rows against float64 on the host: odd sizes, several sequences, gates down to -40, outputs
// poisoned before every run, and the same bits on every run. Prints a table; exit code 1 if anything is wrong.
//
//   nvcc -std=c++20 -O3 -Iinclude -gencode arch=compute_90a,code=sm_90a tests/cuda/prefill_test.cu -o prefill_test
#include <string>

#include <keel/backend/cuda/kda_chunk.cuh>

#include "device_memory.cuh"

namespace launch = keel::cuda_launch;

namespace {

int failures = 0;

void report(const std::string& name, double error, double limit, bool same = true) {
    const bool good = error <= limit && same;  // false for NaN
    if (!good) ++failures;
    std::printf("%-64s %9.2e  limit %7.0e %s%s\n", name.c_str(), error, limit, same ? "" : " NOT THE SAME BITS",
                good ? "" : "  FAILED");
}

/// Delta rule inputs of n rows with H heads of D; `steep`: how far below 0 log decays reach.
struct kda_problem {
    int n, heads, dim;
    std::vector<float> q, k, v, decay, beta;

    kda_problem(int rows, int h, int d, float steep, std::uint64_t seed) : n(rows), heads(h), dim(d) {
        random_source random{seed};
        const auto size = static_cast<std::size_t>(n * heads * dim);
        q = random.normals(size), k = random.normals(size), v = random.normals(size);
        for (auto* x : {&q, &k}) {
            for (std::size_t i = 0; i < size; i += static_cast<std::size_t>(dim)) {
                double sum = 0;
                for (int c = 0; c < dim; ++c) sum += static_cast<double>((*x)[i + c]) * (*x)[i + c];
                for (int c = 0; c < dim; ++c) (*x)[i + c] = static_cast<float>((*x)[i + c] / std::sqrt(sum));
            }
        }
        for (std::size_t i = 0; i < size; ++i) {  // most channels forget slowly, some at once
            const float u = random.uniform();
            decay.push_back(i % 7 == 3 ? -steep * u : -0.1f * u * u);
        }
        for (int i = 0; i < n * heads; ++i) beta.push_back(random.uniform());
    }
};

void test_kda(std::vector<int> lengths, int heads, int dim, float steep, int side_by_side, double limit,
              bool compare = true) {
    int n = 0, longest = 0;
    for (int l : lengths) n += l, longest = std::max(longest, l);
    const kda_problem p(n, heads, dim, steep, static_cast<std::uint64_t>(n * 31 + heads * 7 + dim));
    random_source random{99};
    const auto states = random.normals(lengths.size() * static_cast<std::size_t>(heads * dim * dim), 0.3f);
    const std::size_t state_size = static_cast<std::size_t>(heads * dim * dim);

    std::vector<double> expected(p.v.size()), expected_states(states.begin(), states.end());
    if (compare) parallel(static_cast<int>(lengths.size()) * heads, [&](int job) {
        const int s = job / heads, h = job % heads;
        int first = 0;
        for (int i = 0; i < s; ++i) first += lengths[static_cast<std::size_t>(i)];
        double* const state = &expected_states[s * state_size + static_cast<std::size_t>(h * dim * dim)];
        std::vector<double> read(static_cast<std::size_t>(dim));
        for (int t = first; t < first + lengths[static_cast<std::size_t>(s)]; ++t) {
            const std::size_t at = static_cast<std::size_t>((t * heads + h) * dim);
            std::fill(read.begin(), read.end(), 0.0);
            for (int i = 0; i < dim; ++i) {
                const double decay = std::exp(static_cast<double>(p.decay[at + i])), k = p.k[at + i];
                for (int j = 0; j < dim; ++j) read[j] += (state[i * dim + j] *= decay) * k;
            }
            for (int j = 0; j < dim; ++j) read[j] = p.beta[t * heads + h] * (p.v[at + j] - read[j]);
            for (int i = 0; i < dim; ++i) {
                const double k = p.k[at + i], q = p.q[at + i] / std::sqrt(static_cast<double>(dim));
                for (int j = 0; j < dim; ++j) expected[at + j] += (state[i * dim + j] += k * read[j]) * q;
            }
        }
    });

    const device_array<float> q(p.q), k(p.k), v(p.v), decay(p.decay), beta(p.beta);
    device_array<float> out(p.v.size()), memory(states);
    std::vector<launch::segment> segments;
    int first = 0;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
        segments.push_back({0, reinterpret_cast<unsigned char*>(memory.data() + s * state_size), nullptr, first,
                            lengths[s]});
        first += lengths[s];
    }
    const device_array<launch::segment> on_device(segments);
    const int count = static_cast<int>(lengths.size());
    device_array<unsigned char> workspace(launch::kda_chunk_bytes(count, heads, dim, side_by_side));
    const long long row = heads * dim;
    launch::kda_chunk_args args{{q.data(), row, dim},     {k.data(), row, dim},     {v.data(), row, dim},
                                {decay.data(), row, dim}, {beta.data(), heads, 1}, {out.data(), row, dim}};
    args.segments = on_device.data(), args.segment_count = count, args.longest = longest;
    args.layout.heads = heads, args.layout.head_dim = dim;
    args.layout.layer_floats = static_cast<long long>(state_size);
    args.workspace = workspace.data(), args.workspace_bytes = workspace.size();

    std::vector<float> first_out, first_states;
    bool same = true;
    for (int run = 0; run < 3; ++run) {
        out.poison();
        workspace.poison();
        memory.set(states);
        check(launch::kda_chunk(args, nullptr), "kda_chunk");
        check(cudaDeviceSynchronize(), "kda_chunk");
        if (run == 0) first_out = out.get(), first_states = memory.get();
        same = same && out.get() == first_out && memory.get() == first_states;
    }
    std::string name = "kda_chunk H=" + std::to_string(heads) + " D=" + std::to_string(dim) + " gate>=-" +
                       std::to_string(static_cast<int>(steep)) + " T=";
    for (int l : lengths) name += std::to_string(l) + " ";
    if (!compare) return report(name, 0, limit, same);
    report(name + "out", relative_error(first_out, expected), limit, same);
    report(name + "state", relative_error(first_states, expected_states), limit, same);
}

void test_kda() {
    test_kda({16}, 1, 128, 1, 16, 1e-3);
    test_kda({1}, 2, 128, 40, 16, 1e-3);
    test_kda({64}, 2, 128, 5, 64, 1e-3);
    test_kda({333}, 3, 128, 40, 333, 1e-3);
    test_kda({333}, 3, 128, 40, 64, 1e-3);
    test_kda({5, 17, 32, 200}, 3, 128, 40, 200, 1e-3);
    test_kda({33, 100}, 5, 64, 40, 100, 1e-3);
    test_kda({33, 100}, 5, 32, 40, 32, 1e-3);
    test_kda({4096}, 4, 128, 40, 4096, 1e-3);
    test_kda({2048, 2048}, 32, 128, 1, 2048, 0, false);
}

}  // namespace

int main() {
    test_kda();
    std::printf("%d failures\n", failures);
    return failures != 0;
}
