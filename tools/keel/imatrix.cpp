// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <keel/backend/cpu.hpp>
#include <keel/engine.hpp>
#include <keel/model/importance.hpp>

#include "commands.hpp"
#include "console.hpp"
#include "encoding.hpp"

namespace tool {

namespace {

using keel::index;
using keel::view;

/// The CPU backend, which notes what every matrix of the file is multiplied with. Operations with products inside are
/// done by their products, one after the other.
class collecting : public keel::cpu {
public:
    struct device : keel::cpu::device {
        std::map<const std::byte*, const keel::tensor_info*> names;  // by the place of the data
        keel::importance_matrix seen;

        explicit device(const keel::backend_options& chosen) : keel::cpu::device(chosen) {}
    };

    collecting(std::shared_ptr<device> shared, index workspace_bytes)
        : keel::cpu(shared, workspace_bytes), device_(std::move(shared)) {}

    void matmul(view<const float, 2> x, std::initializer_list<keel::linear<matrix>> products) {
        for (const auto& p : products) note(p.weight, x);
        keel::cpu::matmul(x, products);
    }
    void matmul_heads(const keel::matmul_heads_args<matrix>& a) {
        for (index h = 0; h < a.weight.count; ++h) note(a.weight, a.x.slice(h), h);
        keel::cpu::matmul_heads(a);
    }
    void swiglu(const keel::swiglu_args<matrix>& a) {
        const std::vector<float> hidden = inner(a.x, a.gate, a.up, 0);
        const view<const float, 2> h{hidden.data(), a.x.extent[0], a.down.columns};
        matmul(h, {{a.down, a.out, a.accumulate}});
    }
    void experts(const keel::experts_args<matrix>& a) {
        for (index e = 0; e < a.gate.count; ++e) {
            std::vector<float> rows;  // those that chose this expert
            for (index r = 0; r < a.x.extent[0]; ++r) {
                for (index k = 0; k < a.chosen.extent[1]; ++k) {
                    if (a.chosen(r, k) == e) rows.insert(rows.end(), a.x[r].data, a.x[r].data + a.x.extent[1]);
                }
            }
            if (rows.empty()) continue;
            const index n = static_cast<index>(rows.size()) / a.x.extent[1];
            const std::vector<float> hidden = inner({rows.data(), n, a.x.extent[1]}, a.gate, a.up, e);
            note(a.down, {hidden.data(), n, a.down.columns}, e);
        }
        keel::cpu::experts(a);
    }

private:
    void note(const matrix& weight, view<const float, 2> x, index which = 0) {
        const auto found = device_->names.find(weight.data);
        if (found == device_->names.end()) return;
        for (index r = 0; r < x.extent[0]; ++r) {
            device_->seen.add(std::string(found->second->name), weight.count, which,
                              {x[r].data, static_cast<std::size_t>(x.extent[1])});
        }
    }

    /// silu(gate x) * (up x), with matrix `which` of each.
    std::vector<float> inner(view<const float, 2> x, const matrix& gate, const matrix& up, index which) {
        note(gate, x, which);
        note(up, x, which);
        const index n = x.extent[0];
        std::vector<float> g(static_cast<std::size_t>(n * gate.rows)), u(g.size());
        keel::cpu::matmul(x, {{{gate.matrix(which), gate.owner}, {g.data(), n, gate.rows}},
                              {{up.matrix(which), up.owner}, {u.data(), n, gate.rows}}});
        for (std::size_t i = 0; i < g.size(); ++i) g[i] *= u[i] / (1.0f + std::exp(-g[i]));
        return g;
    }

    std::shared_ptr<device> device_;
};

}  // namespace

void imatrix(const imatrix_options& options) {
    keel::output_file::check_target(options.out,
                                    options.force ? keel::existing_file::replace : keel::existing_file::keep);
    const keel::gguf file = open_file(options.model.path);
    const keel::config shape = keel::read_config(file);
    const keel::tokenizer text = keel::read_tokenizer(file);
    const std::vector<keel::token> tokens = text.encode(read_text(options.file));
    const std::size_t length = static_cast<std::size_t>(options.context);
    const std::size_t chunks = (tokens.size() + length - 1) / length;
    if (tokens.empty()) throw std::runtime_error(options.file + ": holds no tokens");

    const keel::backend_options chosen{.precision = keel::precision::exact, .threads = options.model.threads};
    const auto device = std::make_shared<collecting::device>(chosen);
    for (const keel::tensor_info& t : file.tensors()) device->names.emplace(t.data.data(), &t);
    collecting loader(device, 0);
    auto weights = keel::load_weights(loader, file, shape, adapt(options.model.tell));
    const keel::executor<collecting> run(shape, chosen, options.context, device, std::move(weights));
    for (std::size_t i = 0; i < chunks; ++i) {
        keel::report(adapt(options.model.tell), "imatrix", i, chunks);
        std::vector<keel::token> chunk;
        if (text.add_bos() && text.bos()) chunk.push_back(*text.bos());
        const auto part = std::span(tokens).subspan(i * length, std::min(length, tokens.size() - i * length));
        chunk.insert(chunk.end(), part.begin(), part.end());
        chunk.resize(std::min(chunk.size(), length));
        auto state = run.make_state();
        const keel::job<collecting> work{&state, chunk, keel::want::all};
        run.run({&work, 1}, options.context);
    }
    keel::report(adapt(options.model.tell), "imatrix", chunks, chunks);
    device->seen.save(options.out, options.force ? keel::existing_file::replace : keel::existing_file::keep,
                      options.file, static_cast<index>(chunks), options.context);
    std::printf("%s: importance of %d tensors from %zu tokens\n", options.out.c_str(),
                static_cast<int>(device->seen.size()), tokens.size());
}

}  // namespace tool
