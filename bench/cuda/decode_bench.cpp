// SPDX-License-Identifier: MIT
//
// Decoding on the GPU with the shapes of Kimi-Linear-48B-A3B and random weights in a Q4_K_M mix, made here: no file is
// read. Prints a table: upload speed, then per depth and number of sequences the time of a step.
//   decode_bench [--layers N] [--steps N] [--exact] [--once DEPTH]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <keel/backend/cuda.hpp>
#include <keel/model/executor.hpp>
#include <keel/model/logits.hpp>
#include <keel/sampler.hpp>

namespace keel {
namespace {

config shapes(index layers) {
    config c;
    c.context = 1 << 20;
    c.vocabulary = 163840;
    c.hidden = 2304;
    c.layers = layers;
    c.heads = 32;
    for (index i = 0; i < layers; ++i) c.kda.push_back(i % 4 != 3 && i != 26);
    c.epsilon = 1e-5f;
    c.head_dim = 128;
    c.conv_kernel = 4;
    c.latent_rank = 512;
    c.position_dim = 64;
    c.own_dim = 128;
    c.value_dim = 128;
    c.dense_layers = 1;
    c.dense_ff = 9216;
    c.experts = 256;
    c.chosen = 8;
    c.expert_ff = 1024;
    c.shared_experts = 1;
    c.routed_scale = 2.446f;
    return c;
}

/// llama.cpp's Q4_K_M as far as it decides bytes: values and down projections of some layers and the output are Q6_K.
dtype type_of(const std::string& name, index columns, index layers) {
    const auto ends = [&](const char* tail) { return name.find(tail) != std::string::npos; };
    if (ends("ffn_gate_inp")) return dtype::f32;
    if (columns % 256 != 0) return dtype::q8_0;
    if (name == "output.weight") return dtype::q6_k;
    if (ends("attn_v") || ends("ffn_down")) {
        const index layer = std::stoll(name.substr(4));
        const bool more = layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2;
        if (more) return dtype::q6_k;
    }
    return dtype::q4_k;
}

/// A generator of 64 random bits at a time, of which the upper ones are the better.
struct random_bits {
    std::uint64_t state;

    std::uint64_t next() { return state = state * 6364136223846793005u + 1442695040888963407u; }
    /// What was last drawn as a number from -1 to 1.
    float value() const { return static_cast<float>(static_cast<std::int32_t>(state >> 32)) * 0x1p-31f; }
};

/// Random bytes of a type that are valid blocks of small values, as many as anything here needs; the same in every run,
/// for how many experts are chosen by many rows, and so the time of a step, hangs on them.
class random_bytes {
public:
    const std::byte* of(dtype type, index bytes) {
        std::vector<std::byte>& pool = pools_[type];
        if (static_cast<index>(pool.size()) < bytes) {
            pool.resize(static_cast<std::size_t>(bytes));
            std::vector<std::jthread> helpers;
            constexpr index parts = 16;
            visit_blocks(type, [&]<class Block>() {
                auto* blocks = reinterpret_cast<Block*>(pool.data());
                const index n = bytes / Block::bytes;
                for (index part = 0; part < parts; ++part) {
                    helpers.emplace_back([=] {
                        fill(blocks + n * part / parts, blocks + n * (part + 1) / parts,
                             static_cast<std::uint64_t>(part) * 7919 + sizeof(Block) + 17);
                    });
                }
            });
        }
        return pool.data();
    }

private:
    template <class Block>
    static void fill(Block* first, Block* last, std::uint64_t seed) {
        random_bits random{seed};
        for (Block* b = first; b != last; ++b) {
            for (std::size_t i = 0; i < sizeof(Block); i += 8) {
                const std::uint64_t drawn = random.next(), bits = drawn ^ (drawn >> 29);
                std::memcpy(reinterpret_cast<char*>(b) + i, &bits, std::min<std::size_t>(8, sizeof(Block) - i));
            }
            const float small = random.value();
            if constexpr (requires { b->value.set(small); }) b->value.set(small * 0.02f);
            if constexpr (Block::elements == 256) b->d.set(to_f16(2e-5f));
            if constexpr (Block::elements == 32 && requires { b->d; }) b->d.set(to_f16(2e-4f));
            if constexpr (requires { b->dmin; }) b->dmin.set(to_f16(1.5e-4f));
        }
    }

    std::map<dtype, std::vector<std::byte>> pools_;
};

/// The embedding: much larger than what the layers add, which is alike for all tokens since their weights are not
/// centred. So the choices of 64 tokens fall on some 220 of 256 experts, as those of a trained router do, and not
/// on 65.
std::vector<float> unlike_tokens(index size) {
    std::vector<float> values(static_cast<std::size_t>(size));
    random_bits random{12345};
    for (float& x : values) {
        random.next();
        x = random.value() * 40.0f;
    }
    return values;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// What the host gets of a step.
enum class answer { nothing, tokens, logits };

struct options {
    index layers = 27, steps = 64, once = -1;
    precision arithmetic = precision::fast;
};

void run(const options& o) {
    const config c = shapes(o.layers);
    const backend_options backend{o.arithmetic, 0, 0};
    const auto device = std::make_shared<cuda_device>(backend);
    cuda b(device, 0);
    random_bytes random;
    const std::vector<float> embedding = unlike_tokens(c.vocabulary * c.hidden);
    weights<cuda> w = make_layers<cuda>(c);
    index bytes = 0, expert_bytes = 0;
    double upload = 0;
    for_each_tensor(c, w, [&](const std::string& name, const tensor_shape& shape, auto& to) {
        if constexpr (std::is_same_v<std::decay_t<decltype(to)>, cuda::vector>) {
            std::vector<float> values(static_cast<std::size_t>(shape.size()), 1.0f);
            for (std::size_t i = 0; i < values.size(); ++i) values[i] += 0.01f * static_cast<float>(i % 17);
            if (name.find("ssm_a") != std::string::npos) std::ranges::fill(values, -0.5f);
            if (name.find("conv1d") != std::string::npos) std::ranges::fill(values, 0.25f);
            to = b.bind(values);
        } else {
            const index columns = shape.extent[0];
            const bool tokens = name == "token_embd.weight";
            const dtype type = tokens ? dtype::f32 : type_of(name, columns, c.layers);
            matrix_view m{nullptr, type, shape.extent[2], shape.extent[1], columns};
            m.data = tokens ? reinterpret_cast<const std::byte*>(embedding.data()) : random.of(type, m.bytes());
            const double start = seconds();
            to = b.bind(m, nullptr);
            upload += seconds() - start;
            bytes += m.bytes();
            if (name.find("_exps") != std::string::npos) expert_bytes += m.bytes();
            if (tokens) bytes -= m.bytes();
        }
    });
    std::byte sync[4];
    const auto some = b.allocate(4);
    const double start = seconds();
    b.download(sync, some.data(), 4);
    upload += seconds() - start;
    const double token_bytes = static_cast<double>(bytes - expert_bytes) + static_cast<double>(expert_bytes) *
                                                                               static_cast<double>(c.chosen) /
                                                                               static_cast<double>(c.experts);
    std::printf("weights %.2f GB, uploaded at %.2f GB/s; %.3f GB a token\n", static_cast<double>(bytes) * 1e-9,
                static_cast<double>(bytes) * 1e-9 / upload, token_bytes * 1e-9);
    for (const std::string& note : device->notes()) std::printf("note: %s\n", note.c_str());

    const executor<cuda> model(c, backend, 2048, device, std::move(w));
    for (const index rows : {index{512}, index{2048}, index{8192}}) {
        if (o.once >= 0 || o.arithmetic == precision::exact) continue;
        std::vector<token> prompt(static_cast<std::size_t>(rows));
        for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<token>(i * 7919 % 160000);
        double best = 1e30;
        for (int round = 0; round < 3; ++round) {
            auto state = model.make_state();
            b.download(sync, some.data(), 4);
            const double begin = seconds();
            for (std::size_t i = 0; i < prompt.size(); i += 2048) {
                const job<cuda> next{
                    &state, std::span<const token>(prompt).subspan(i, std::min<std::size_t>(2048, prompt.size() - i))};
                model.run({&next, 1}, 9000);
            }
            b.download(sync, some.data(), 4);
            best = std::min(best, seconds() - begin);
        }
        std::printf("prefill %5ld: %8.2f ms, %8.0f tok/s\n", rows, best * 1e3, static_cast<double>(rows) / best);
    }
    std::printf("%9s %9s %12s %12s %10s %8s\n", "sequences", "depth", "ms a step", "tok/s", "GB/s", "of 4630");
    for (const auto& [sequences, depth] : std::vector<std::pair<index, index>>{
             {1, 0}, {1, 4096}, {1, 32768}, {1, 131072}, {2, 0}, {4, 0}, {8, 0}, {16, 0}, {64, 0}}) {
        if (o.once >= 0 && (sequences > 1 || depth != o.once)) continue;
        std::vector<sequence_state<cuda>> states;
        for (index i = 0; i < sequences; ++i) {
            states.push_back(model.make_state());
            static_cast<void>(states.back().extend(b, 0, depth + 2 * o.steps));
            std::vector<f16> rows(static_cast<std::size_t>(model.layout().block_bytes() / 2));
            for (std::size_t j = 0; j < rows.size(); ++j)
                rows[j] = to_f16(static_cast<float>(j * 37 % 101) * 0.02f - 1);
            for (const auto& block : states.back().blocks()) {
                b.upload(block->data(), reinterpret_cast<const std::byte*>(rows.data()), block->size());
            }
            states.back().advance(depth);
        }
        std::vector<kept_logits<cuda>> logits(states.size());
        std::vector<token> next(states.size(), 17);
        sampler sample({.temperature = 0.7f, .top_k = 40});
        const auto step = [&](answer wanted) {
            std::vector<job<cuda>> jobs;
            for (std::size_t i = 0; i < states.size(); ++i) {
                next[i] = static_cast<token>((next[i] * 7919 + 13 + static_cast<token>(i)) % 160000);
                jobs.push_back({.state = &states[i],
                                .tokens = {&next[i], 1},
                                .last = wanted == answer::nothing ? nullptr : &logits[i]});
            }
            model.run(std::span<const job<cuda>>(jobs), depth + o.steps + 64);
            if (wanted == answer::nothing) return;
            for (auto& row : logits) {
                if (wanted == answer::logits) static_cast<void>(row.values(model));
                if (wanted == answer::tokens) static_cast<void>(row.draw(model, sample));
            }
        };
        const index warm = o.once >= 0 ? 0 : 8;
        for (index i = 0; i < warm; ++i) step(i == 0 ? answer::logits : answer::nothing);
        double sum = 0;
        for (const float x : logits.front().values(model)) sum += static_cast<double>(x);
        if (warm > 0 && !(sum > -1e30 && sum < 1e30)) std::printf("logits are not finite\n");
        constexpr std::pair<answer, const char*> ways[] = {
            {answer::nothing, ""}, {answer::tokens, "with tokens"}, {answer::logits, "with logits"}};
        for (const auto& [wanted, name] : ways) {
            if (o.once >= 0 && wanted != answer::nothing) continue;
            b.download(sync, some.data(), 4);
            const double begin = seconds();
            const index steps = o.once >= 0 ? 1 : wanted == answer::nothing ? o.steps / 2 : o.steps / 4;
            for (index i = 0; i < steps; ++i) step(wanted);
            b.download(sync, some.data(), 4);
            const double each = (seconds() - begin) / static_cast<double>(steps);
            std::printf("%9ld %9ld %12.4f %12.1f %10.1f %7.1f%% %s\n", sequences, depth, each * 1e3,
                        static_cast<double>(sequences) / each, token_bytes / each * 1e-9, token_bytes / each / 4.63e10,
                        name);
        }
    }
}

}  // namespace
}  // namespace keel

int main(int argc, char** argv) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    keel::options o;
    for (int i = 1; i < argc; ++i) {
        const std::string what = argv[i];
        if (what == "--exact") o.arithmetic = keel::precision::exact;
        if (i + 1 == argc) break;
        if (what == "--layers") o.layers = std::stoll(argv[i + 1]);
        if (what == "--steps") o.steps = std::stoll(argv[i + 1]);
        if (what == "--once") o.once = std::stoll(argv[i + 1]);
    }
    try {
        keel::run(o);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
