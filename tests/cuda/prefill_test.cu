// SPDX-License-Identifier: MIT
//
// The kernels for many rows against float64 on the host: odd sizes, several sequences, gates down to -40, outputs
// poisoned before every run, and the same bits on every run. Prints a table; exit code 1 if anything is wrong.
//
//   nvcc -std=c++20 -O3 -Iinclude -gencode arch=compute_90a,code=sm_90a tests/cuda/prefill_test.cu -o prefill_test
#include <string>

#include <keel/backend/cuda/feed_forward.cuh>
#include <keel/backend/cuda/flash.cuh>
#include <keel/backend/cuda/kda_chunk.cuh>
#include <keel/backend/cuda/products.cuh>

#include "device_matrix.cuh"
#include "device_memory.cuh"

namespace launch = keel::cuda_launch;

namespace {

int failures = 0;
int runs = 3;  // that must all give the same bits

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
    if (compare)
        parallel(static_cast<int>(lengths.size()) * heads, [&](int job) {
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
        segments.push_back(
            {0, reinterpret_cast<unsigned char*>(memory.data() + s * state_size), nullptr, first, lengths[s]});
        first += lengths[s];
    }
    const device_array<launch::segment> on_device(segments);
    const int count = static_cast<int>(lengths.size());
    device_array<unsigned char> workspace(launch::kda_chunk_bytes(count, heads, dim, side_by_side));
    const long long row = heads * dim;
    launch::kda_chunk_args args{{q.data(), row, dim},     {k.data(), row, dim},    {v.data(), row, dim},
                                {decay.data(), row, dim}, {beta.data(), heads, 1}, {out.data(), row, dim}};
    args.segments = on_device.data(), args.segment_count = count, args.longest = longest;
    args.layout.heads = heads, args.layout.head_dim = dim;
    args.layout.layer_floats = static_cast<long long>(state_size);
    args.workspace = workspace.data(), args.workspace_bytes = workspace.size();

    std::vector<float> first_out, first_states;
    bool same = true;
    for (int run = 0; run < runs; ++run) {
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
    test_kda({3000, 1100}, 4, 128, 40, 333, 1e-3);
}

/// y = W x in float64.
std::vector<double> product(const float* w, int rows, int columns, const std::vector<float>& x, int n) {
    std::vector<double> y(static_cast<std::size_t>(n) * static_cast<std::size_t>(rows));
    parallel(n, [&](int i) {
        for (int r = 0; r < rows; ++r) {
            double sum = 0;
            for (int c = 0; c < columns; ++c) {
                sum += static_cast<double>(w[static_cast<std::size_t>(r) * columns + c]) *
                       static_cast<double>(x[static_cast<std::size_t>(i) * columns + c]);
            }
            y[static_cast<std::size_t>(i) * rows + r] = sum;
        }
    });
    return y;
}

void test_products(std::vector<keel::dtype> types, std::vector<int> sizes, int n, int columns, bool accumulate) {
    random_source random{static_cast<std::uint64_t>(n * 131 + columns)};
    const auto x = random.normals(static_cast<std::size_t>(n) * static_cast<std::size_t>(columns), 3.0f);
    const device_array<float> x_device(x);
    device_array<unsigned char> workspace(launch::products_bytes(n, columns));
    launch::products_args args{x_device.data(), columns, n, columns};
    std::vector<device_matrix> matrices;
    std::vector<device_array<float>> outs;
    std::vector<std::vector<double>> expected;
    std::vector<std::vector<float>> before;
    for (std::size_t i = 0; i < types.size(); ++i) {
        const auto blocks = random_blocks(types[i], sizes[i], columns, random);
        matrices.push_back(upload_matrix(types[i], 1, sizes[i], columns, blocks));
        const auto w = decode(types[i], sizes[i], columns, blocks);
        expected.push_back(product(w.data(), sizes[i], columns, x, n));
        before.push_back(random.normals(expected.back().size()));
        for (std::size_t j = 0; accumulate && j < before.back().size(); ++j)
            expected.back()[j] += static_cast<double>(before.back()[j]);
        outs.emplace_back(expected.back().size());
        args.list[args.count++] = {matrices.back().matrix, outs.back().data(), sizes[i], 0, accumulate};
    }
    args.workspace = workspace.data();
    std::vector<std::vector<float>> first;
    bool same = true;
    for (int run = 0; run < runs; ++run) {
        workspace.poison();
        for (std::size_t i = 0; i < outs.size(); ++i) {
            outs[i].poison();
            if (accumulate) outs[i].set(before[i]);
        }
        check(launch::products(args, nullptr), "products");
        check(cudaDeviceSynchronize(), "products");
        for (std::size_t i = 0; i < outs.size(); ++i) {
            if (run == 0) first.push_back(outs[i].get());
            same = same && outs[i].get() == first[i];
        }
    }
    for (std::size_t i = 0; i < outs.size(); ++i) {
        report("products n=" + std::to_string(n) + " columns=" + std::to_string(columns) + " rows=" +
                   std::to_string(sizes[i]) + " " + std::string(keel::info(types[i]).name) + (accumulate ? " +=" : ""),
               relative_error(first[i], expected[i]), keel::info(types[i]).block_elements == 1 ? 1e-5 : 2e-3, same);
    }
}

void test_products() {
    using keel::dtype;
    for (const dtype type : {dtype::f32, dtype::f16, dtype::bf16, dtype::q8_0, dtype::q4_0, dtype::q4_1, dtype::q5_0,
                             dtype::q5_1, dtype::q2_k, dtype::q3_k, dtype::q4_k, dtype::q5_k, dtype::q6_k,
                             dtype::iq4_nl, dtype::iq4_xs, dtype::mxfp4}) {
        test_products({type}, {300}, 77, 512, false);
        test_products({type}, {300}, 20, 512, true);
    }
    test_products({dtype::q4_k, dtype::q6_k, dtype::q8_0}, {520, 256, 40}, 64, 1280, true);
    test_products({dtype::q4_k, dtype::f16}, {4096, 7}, 3, 2304, false);
    test_products({dtype::q5_k, dtype::f16, dtype::f32}, {33, 70, 130}, 9, 256, false);
    test_products({dtype::q4_k, dtype::q6_k, dtype::q4_k, dtype::f32}, {520, 256, 64, 33}, 200, 1280, false);
    test_products({dtype::q8_0, dtype::f32, dtype::f16}, {128, 100, 31}, 1, 96, true);
    test_products({dtype::q8_0, dtype::bf16}, {512, 100}, 130, 2304, true);
    test_products({dtype::f32, dtype::f16}, {70, 40}, 65, 50, false);
}

/// Random matrices on the device, and their values.
struct known_matrix {
    device_matrix on_device;
    std::vector<float> values;

    known_matrix(keel::dtype type, int count, int rows, int columns, random_source& random)
        : known_matrix(type, count, rows, columns, random_blocks(type, count * rows, columns, random)) {}

private:
    template <class Blocks>
    known_matrix(keel::dtype type, int count, int rows, int columns, const Blocks& blocks)
        : on_device(upload_matrix(type, count, rows, columns, blocks)),
          values(decode(type, count * rows, columns, blocks)) {}
};

/// `count` gated networks.
struct network {
    int hidden, width;
    known_matrix gate, up, down;

    network(keel::dtype type, keel::dtype down_type, int count, int hidden_columns, int w, random_source& random)
        : hidden(hidden_columns),
          width(w),
          gate(type, count, width, hidden, random),
          up(type, count, width, hidden, random),
          down(down_type, count, hidden, width, random) {}

    /// y += weight times network `which` of x.
    void add(int which, double weight, const float* x, double* y) const {
        const std::size_t first = static_cast<std::size_t>(which) * static_cast<std::size_t>(width * hidden);
        const float *const g = &gate.values[first], *const u = &up.values[first], *const d = &down.values[first];
        std::vector<double> inner(static_cast<std::size_t>(width));
        for (int r = 0; r < width; ++r) {
            double a = 0, b = 0;
            for (int c = 0; c < hidden; ++c) {
                a += static_cast<double>(g[r * hidden + c]) * static_cast<double>(x[c]);
                b += static_cast<double>(u[r * hidden + c]) * static_cast<double>(x[c]);
            }
            inner[static_cast<std::size_t>(r)] = a / (1 + std::exp(-a)) * b;
        }
        for (int c = 0; c < hidden; ++c) {
            double sum = 0;
            for (int r = 0; r < width; ++r)
                sum += static_cast<double>(d[c * width + r]) * inner[static_cast<std::size_t>(r)];
            y[c] += weight * sum;
        }
    }
};

/// `shared`: the width of one more network for every row, or 0.
void test_feed_forward(keel::dtype type, keel::dtype down_type, int n, int k, int experts, int hidden, int width,
                       bool accumulate, int shared = 0) {
    random_source random{static_cast<std::uint64_t>(n * 17 + experts)};
    const network of(type, down_type, std::max(experts, 1), hidden, width, random);
    const auto x = random.normals(static_cast<std::size_t>(n * hidden));
    const auto before = random.normals(static_cast<std::size_t>(n * hidden));
    std::vector<int> chosen;
    std::vector<float> weights;
    for (int i = 0; experts > 0 && i < n; ++i) {
        for (int slot = 0; slot < k; ++slot) {  // unbalanced: low experts are popular, the last one is never chosen
            int e = 0;
            do {
                const float u = random.uniform();
                e = static_cast<int>(u * u * static_cast<float>(experts - 1));
            } while (std::find(chosen.end() - slot, chosen.end(), e) != chosen.end());
            chosen.push_back(e);
            weights.push_back(random.uniform());
        }
    }
    const network one_more(type, down_type, 1, hidden, std::max(shared, width), random);
    std::vector<double> expected(x.size());
    parallel(n, [&](int i) {
        const float* const row = &x[static_cast<std::size_t>(i * hidden)];
        double* const to = &expected[static_cast<std::size_t>(i * hidden)];
        for (int slot = 0; slot < k; ++slot) {
            const auto pair = static_cast<std::size_t>(i * k + slot);
            if (experts > 0) of.add(chosen[pair], static_cast<double>(weights[pair]), row, to);
        }
        if (experts == 0) of.add(0, 1, row, to);
        if (shared > 0) one_more.add(0, 1, row, to);
        for (int c = 0; accumulate && c < hidden; ++c) {
            to[c] += static_cast<double>(before[static_cast<std::size_t>(i * hidden + c)]);
        }
    });
    const device_array<float> x_device(x), weights_device(weights);
    const device_array<int> chosen_device(chosen);
    device_array<float> out(x.size());
    device_array<unsigned char> workspace(
        launch::feed_forward_bytes(n, experts > 0 ? k : 0, experts, hidden, width, 2));
    launch::feed_forward_args args{{x_device.data(), hidden, n}};
    if (experts > 0) args.chosen = chosen_device.data(), args.weights = weights_device.data();
    args.chosen_row = args.weights_row = args.k = k;
    args.gate = of.gate.on_device.matrix, args.up = of.up.on_device.matrix, args.down = of.down.on_device.matrix;
    if (shared > 0) {
        args.shared_gate = one_more.gate.on_device.matrix, args.shared_up = one_more.up.on_device.matrix;
        args.shared_down = one_more.down.on_device.matrix;
    }
    args.out = out.data(), args.out_row = hidden, args.accumulate = accumulate, args.workspace = workspace.data();
    std::vector<float> first;
    bool same = true;
    for (int run = 0; run < runs; ++run) {
        workspace.poison();
        out.poison();
        if (accumulate) out.set(before);
        check(launch::feed_forward(args, nullptr), "feed_forward");
        check(cudaDeviceSynchronize(), "feed_forward");
        if (run == 0) first = out.get();
        same = same && out.get() == first;
    }
    report("feed_forward n=" + std::to_string(n) + " k=" + std::to_string(k) + " X=" + std::to_string(experts) +
               " hidden=" + std::to_string(hidden) + " width=" + std::to_string(width) + " " +
               std::string(keel::info(type).name) + " " + std::string(keel::info(down_type).name) +
               (shared > 0 ? " shared " + std::to_string(shared) : ""),
           relative_error(first, expected), 2e-3, same);
}

void test_feed_forward() {
    using keel::dtype;
    test_feed_forward(dtype::q4_k, dtype::q6_k, 150, 1, 0, 512, 768, true);
    test_feed_forward(dtype::q8_0, dtype::q8_0, 33, 1, 0, 160, 96, false);
    test_feed_forward(dtype::q4_k, dtype::q6_k, 333, 4, 16, 512, 256, false, 256);
    test_feed_forward(dtype::f32, dtype::f16, 40, 2, 8, 64, 48, true);
    test_feed_forward(dtype::q4_k, dtype::q4_k, 1, 8, 256, 256, 256, false);
    test_feed_forward(dtype::q4_k, dtype::q6_k, 13, 4, 16, 512, 256, true);
    test_feed_forward(dtype::q5_k, dtype::q8_0, 64, 8, 64, 256, 320, false, 320);
    test_feed_forward(dtype::q4_0, dtype::bf16, 17, 2, 8, 160, 96, true);
    test_feed_forward(dtype::f32, dtype::f16, 5, 2, 8, 64, 48, true);
    test_feed_forward(dtype::q4_k, dtype::q6_k, 50, 1, 0, 512, 768, true);
    // Experts with few rows of K-quantised weights.
    test_feed_forward(dtype::q4_k, dtype::q4_k, 13, 4, 16, 768, 512, false, 512);
    test_feed_forward(dtype::q4_k, dtype::q6_k, 13, 4, 16, 512, 512, true, 1024);
    test_feed_forward(dtype::q5_k, dtype::q5_k, 32, 8, 64, 1024, 768, true);
    test_feed_forward(dtype::q6_k, dtype::q4_k, 32, 8, 64, 1280, 256, false, 256);
    test_feed_forward(dtype::q4_k, dtype::q6_k, 32, 8, 64, 2304, 1024, true, 1024);
    test_feed_forward(dtype::q4_k, dtype::q5_k, 32, 4, 32, 1280, 2048, false);
    test_feed_forward(dtype::q4_k, dtype::q4_k, 64, 8, 64, 512, 256, false, 256);
}

struct sequence {
    int position, rows;
};

void test_attend(std::vector<sequence> sequences, int heads, int key, int position_key, int value, int rank, bool half,
                 keel::dtype type, int positions) {
    random_source random{static_cast<std::uint64_t>(heads * 1000 + key)};
    const int width = rank + position_key, layers = 2, layer = 1;
    const auto key_blocks = random_blocks(type, heads * rank, key, random);
    const auto value_blocks = random_blocks(type, heads * value, rank, random);
    const auto key_values = decode(type, heads * rank, key, key_blocks);
    const auto value_values = decode(type, heads * value, rank, value_blocks);
    const auto key_up = upload_matrix(type, heads, rank, key, key_blocks);
    const auto value_up = upload_matrix(type, heads, value, rank, value_blocks);
    int n = 0;
    for (const auto& s : sequences) n += s.rows;
    const auto q = random.normals(static_cast<std::size_t>(n * heads * (key + position_key)), 2.0f);
    const float scale = 1 / std::sqrt(static_cast<float>(key + position_key));
    std::vector<double> expected;
    std::vector<device_array<unsigned char>> memory;
    std::vector<device_array<unsigned char*>> tables;
    std::vector<launch::segment> segments;
    int first = 0;
    for (const auto& s : sequences) {
        const int length = s.position + s.rows;
        auto latents = random.normals(static_cast<std::size_t>(length * width));
        std::vector<unsigned char*> table;
        const std::size_t row_bytes = static_cast<std::size_t>(width) * (half ? 2 : 4);
        for (int block = 0; block * 256 < length; ++block) {
            std::vector<unsigned char> bytes(layers * 256 * row_bytes, 0xFF);
            for (int i = block * 256; i < std::min(length, block * 256 + 256); ++i) {
                for (int c = 0; c < width; ++c) {
                    float& x = latents[static_cast<std::size_t>(i * width + c)];
                    const keel::f16 h = keel::to_f16(x);
                    if (half) x = keel::to_float(h);
                    std::memcpy(&bytes[static_cast<std::size_t>(layer * 256 + i % 256) * row_bytes +
                                       static_cast<std::size_t>(c) * (half ? 2 : 4)],
                                half ? static_cast<const void*>(&h) : &x, half ? 2 : 4);
                }
            }
            memory.emplace_back(bytes);
            table.push_back(memory.back().data());
        }
        tables.emplace_back(table);
        segments.push_back({s.position, nullptr, tables.back().data(), first, s.rows});
        std::vector<double> out(static_cast<std::size_t>(s.rows * heads * value));
        parallel(heads, [&](int h) {
            std::vector<double> keys(static_cast<std::size_t>(length * (key + position_key))),
                values(static_cast<std::size_t>(length * value));
            for (int i = 0; i < length; ++i) {
                const float* const c = &latents[static_cast<std::size_t>(i * width)];
                double* const k = &keys[static_cast<std::size_t>(i * (key + position_key))];
                for (int r = 0; r < rank; ++r) {
                    for (int d = 0; d < key; ++d)
                        k[d] += static_cast<double>(key_values[static_cast<std::size_t>((h * rank + r) * key + d)]) *
                                static_cast<double>(c[r]);
                }
                for (int d = 0; d < position_key; ++d) k[key + d] = static_cast<double>(c[rank + d]);
                for (int d = 0; d < value; ++d) {
                    for (int r = 0; r < rank; ++r)
                        values[static_cast<std::size_t>(i * value + d)] +=
                            static_cast<double>(value_values[static_cast<std::size_t>((h * value + d) * rank + r)]) *
                            static_cast<double>(c[r]);
                }
            }
            std::vector<double> scores(static_cast<std::size_t>(length));
            for (int r = 0; r < s.rows; ++r) {
                const float* const x = &q[static_cast<std::size_t>(((first + r) * heads + h) * (key + position_key))];
                double top = -1e300, sum = 0;
                const int visible = s.position + r + 1;
                for (int i = 0; i < visible; ++i) {
                    double score = 0;
                    for (int d = 0; d < key + position_key; ++d)
                        score +=
                            static_cast<double>(x[d]) * keys[static_cast<std::size_t>(i * (key + position_key) + d)];
                    top = std::max(top, scores[static_cast<std::size_t>(i)] = score * static_cast<double>(scale));
                }
                for (int i = 0; i < visible; ++i)
                    sum += scores[static_cast<std::size_t>(i)] = std::exp(scores[static_cast<std::size_t>(i)] - top);
                double* const y = &out[static_cast<std::size_t>((r * heads + h) * value)];
                for (int i = 0; i < visible; ++i) {
                    for (int d = 0; d < value; ++d)
                        y[d] +=
                            scores[static_cast<std::size_t>(i)] / sum * values[static_cast<std::size_t>(i * value + d)];
                }
            }
        });
        expected.insert(expected.end(), out.begin(), out.end());
        first += s.rows;
    }
    const device_array<float> q_device(q);
    device_array<float> out(expected.size());
    device_array<unsigned char> workspace(launch::expanded_attend_bytes(n, positions, heads, width, rank, key, value));
    launch::expanded_attend_args args{{q_device.data(), heads * (key + position_key), key + position_key},
                                      {out.data(), heads * value, value}};
    args.key_up = key_up.matrix, args.value_up = value_up.matrix, args.scale = scale;
    args.segments = segments.data(), args.segment_count = static_cast<int>(segments.size()), args.layer = layer;
    args.layout.latent_width = width, args.layout.half = half;
    args.workspace = workspace.data(), args.workspace_bytes = workspace.size();
    std::vector<float> first_out;
    bool same = true;
    for (int run = 0; run < runs; ++run) {
        workspace.poison();
        out.poison();
        check(launch::expanded_attend(args, nullptr), "expanded_attend");
        check(cudaDeviceSynchronize(), "expanded_attend");
        if (run == 0) first_out = out.get();
        same = same && out.get() == first_out;
    }
    std::string name = "expanded_attend H=" + std::to_string(heads) + " " + std::to_string(key) + "+" +
                       std::to_string(position_key) + "/" + std::to_string(value) + (half ? " f16 " : " f32 ");
    for (const auto& s : sequences) name += std::to_string(s.position) + "+" + std::to_string(s.rows) + " ";
    report(name + "by " + std::to_string(positions), relative_error(first_out, expected), 3e-3, same);
}

void test_attend() {
    using keel::dtype;
    test_attend({{0, 128}}, 2, 128, 64, 128, 512, true, dtype::q8_0, 256);
    test_attend({{0, 1}}, 1, 128, 64, 128, 512, true, dtype::f16, 256);
    test_attend({{77, 333}}, 3, 128, 64, 128, 512, false, dtype::q8_0, 512);
    test_attend({{900, 200}}, 2, 128, 64, 128, 512, true, dtype::f32, 256);
    test_attend({{0, 300}, {301, 5}, {17, 40}, {700, 129}}, 2, 128, 64, 128, 512, true, dtype::q8_0, 256);
    test_attend({{0, 300}, {301, 5}, {17, 40}, {700, 129}}, 2, 128, 64, 128, 512, true, dtype::q8_0, 2048);
    test_attend({{13, 70}, {0, 100}}, 4, 32, 16, 32, 64, false, dtype::bf16, 256);
}

}  // namespace

/// With an argument, that many runs of a few cases: races show late.
int main(int count, char** words) {
    using keel::dtype;
    if (count > 1) {
        runs = std::atoi(words[1]);
        test_kda({100, 37}, 4, 128, 40, 64, 1e-3);
        test_products({dtype::q4_k, dtype::q6_k}, {520, 256}, 200, 512, true);
        test_products({dtype::q4_k, dtype::q6_k}, {520, 256}, 20, 512, true);
        test_feed_forward(dtype::q4_k, dtype::q6_k, 333, 4, 16, 256, 256, true);
        test_feed_forward(dtype::q4_k, dtype::q6_k, 13, 4, 16, 256, 256, true, 256);
        test_attend({{0, 300}, {301, 5}}, 2, 128, 64, 128, 512, true, dtype::q8_0, 256);
    } else {
        test_attend();
        test_kda();
        test_products();
        test_feed_forward();
    }
    std::printf("%d failures in %d runs of each\n", failures, runs);
    return failures != 0;
}
