// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <keel/core/quant.hpp>
#include <keel/model/importance.hpp>
#include <keel/model/requantize.hpp>

#include "catch.hpp"
#include "io/support.hpp"

using keel::dtype;
using keel::errc;
using keel_test::expect_error;
using keel_test::scratch_folder;

namespace {

const keel::gguf& source() {
    static const auto file = keel::gguf::open(KEEL_TEST_DATA "/models/mid-bf16.gguf");
    return file;
}

std::vector<float> values(const keel::tensor_info& t) {
    std::vector<float> all(static_cast<std::size_t>(t.dims[0] * t.dims[1] * t.dims[2] * t.dims[3]));
    keel::decode_row(static_cast<dtype>(t.type_id), t.data.data(), all.data(), static_cast<keel::index>(all.size()));
    return all;
}

/// |a - b| / |a|, with weights per column for the squares.
double distance(const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& weights = {1.0f}) {
    double off = 0, all = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        const double w = static_cast<double>(weights[i % weights.size()]);
        const double x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
        off += w * (x - y) * (x - y);
        all += w * x * x;
    }
    return std::sqrt(off / all);
}

}  // namespace

TEST_CASE("which tensors may be encoded, and what replaces a type that does not fit") {
    const std::vector<keel::index> matrix = {256, 64}, vector = {256}, taps = {4, 1, 256};
    CHECK(keel::stays_f32("blk.0.attn_norm.weight", vector));
    CHECK(keel::stays_f32("blk.0.ssm_a", matrix));
    CHECK(keel::stays_f32("blk.0.ssm_dt.bias", vector));
    CHECK(keel::stays_f32("blk.0.ssm_conv1d_q.weight", taps));
    CHECK(keel::stays_f32("blk.0.ffn_gate_inp.weight", matrix));
    CHECK_FALSE(keel::stays_f32("blk.0.ffn_gate.weight", matrix));
    CHECK_FALSE(keel::stays_f32("blk.0.ssm_beta.weight", matrix));
    CHECK(keel::fitting(dtype::q4_k, 512) == dtype::q4_k);
    CHECK(keel::fitting(dtype::q4_k, 128) == dtype::iq4_nl);
    CHECK(keel::fitting(dtype::q5_k, 128) == dtype::q5_0);
    CHECK(keel::fitting(dtype::q6_k, 128) == dtype::q8_0);
    CHECK(keel::fitting(dtype::q2_k, 128) == dtype::iq4_nl);
    CHECK(keel::fitting(dtype::iq4_xs, 128) == dtype::iq4_nl);
    CHECK(keel::fitting(dtype::q8_0, 72) == dtype::f16);
    CHECK(keel::find_type("bf16") == dtype::bf16);
    CHECK(keel::find_type("Q4_k") == dtype::q4_k);
    CHECK_FALSE(keel::find_type("q8_1"));
    CHECK_FALSE(keel::find_type(""));
    CHECK(keel::detail::matches("*", ""));
    CHECK(keel::detail::matches("blk.*.attn_v*", "blk.12.attn_v.weight"));
    CHECK(keel::detail::matches("*v*v*", "blk.attn_v_v"));
    CHECK_FALSE(keel::detail::matches("blk.*.attn_v", "blk.12.attn_v.weight"));
    CHECK_FALSE(keel::detail::matches("blk.1.", "blk.12."));
}

TEST_CASE("every type is written, near to what was there, with all metadata") {
    const scratch_folder scratch;
    struct expectation {
        const char* name;
        double worst;
    };
    for (const auto [name, worst] : {expectation{"f32", 0},
                                     {"bf16", 0},
                                     {"q8_0", 0.008},
                                     {"q6_k", 0.025},
                                     {"q5_k_m", 0.045},
                                     {"q4_k_m", 0.09},
                                     {"iq4_nl", 0.1},
                                     {"mxfp4", 0.13}}) {
        CAPTURE(name);
        keel::requantize(source(), scratch / "out.gguf", {.type = name, .policy = keel::existing_file::replace});
        const auto made = keel::gguf::open(scratch / "out.gguf");
        REQUIRE(made.tensors().size() == source().tensors().size());
        for (const keel::tensor_info& t : source().tensors()) {
            CAPTURE(t.name);
            const auto& copy = made.require(t.name);
            const bool stays = keel::stays_f32(t.name, t.shape());
            CHECK((copy.type->name == "F32") == (stays || std::string_view(name) == "f32"));
            const double off = distance(values(t), values(copy));
            CHECK(off <= (stays ? 0 : worst));
        }
        for (const keel::gguf_value& v : source().values()) {
            if (v.key() != "general.file_type") CHECK(made.find_value(v.key()) != nullptr);
        }
    }
}

TEST_CASE("the bytes do not depend on who does the work, and tensors of the wanted type are copied") {
    const scratch_folder scratch;
    keel::requantize(source(), scratch / "a.gguf", {.type = "q4_k_m"});
    keel::requantize(source(), scratch / "b.gguf",
                     {.type = "q4_k_m", .run = [](keel::index count, const std::function<void(keel::index)>& job) {
                          for (keel::index i = count; i-- > 0;) job(i);
                      }});
    const std::string a = keel_test::read_file(scratch / "a.gguf");
    CHECK(a == keel_test::read_file(scratch / "b.gguf"));
    keel::requantize(keel::gguf::open(scratch / "a.gguf"), scratch / "c.gguf", {.type = "q4_k_m"});
    CHECK(a == keel_test::read_file(scratch / "c.gguf"));
}

TEST_CASE("overrides decide before the mixture does") {
    const scratch_folder scratch;
    keel::requantize(
        source(), scratch / "out.gguf",
        {.type = "q4_k_m", .overrides = {{"blk.0.attn_q.weight", dtype::q8_0}, {"*.attn_q.*", dtype::q5_1}}});
    const auto made = keel::gguf::open(scratch / "out.gguf");
    CHECK(made.require("blk.0.attn_q.weight").type->name == "Q8_0");
    CHECK(made.require("blk.1.attn_q.weight").type->name == "Q5_1");
    expect_error(errc::argument, {"*.attn_z.*"}, [&] {
        keel::requantize(source(), scratch / "no.gguf", {.overrides = {{"*.attn_z.*", dtype::q5_1}}});
    });
    expect_error(errc::argument, {"*norm*"}, [&] {  // never encoded
        keel::requantize(source(), scratch / "no.gguf", {.overrides = {{"*norm*", dtype::q5_1}}});
    });
    expect_error(errc::argument, {"q4_k_x"},
                 [&] { keel::requantize(source(), scratch / "no.gguf", {.type = "q4_k_x"}); });
    expect_error(errc::file, {"out.gguf", "exists"}, [&] { keel::requantize(source(), scratch / "out.gguf"); });
    CHECK(scratch.files() == 1);
}

TEST_CASE("values that are not finite are refused, also those that f16 makes infinite") {
    const scratch_folder scratch;
    for (const float bad : {70000.0f, std::nanf(""), -INFINITY}) {
        std::vector<float> rows(256 * 4, 0.5f);
        rows[300] = bad;
        const std::vector<keel::index> dims = {256, 4};
        keel::gguf_writer writer(scratch / "in.gguf", keel::existing_file::replace);
        writer.declare("some.weight", dtype::f32, dims);
        writer.write("some.weight", std::as_bytes(std::span(rows)));
        writer.finish();
        expect_error(errc::numeric, {"some.weight"}, [&] {
            keel::requantize(keel::gguf::open(scratch / "in.gguf"), scratch / "out.gguf", {.type = "f16"});
        });
    }
    CHECK(scratch.files() == 1);
}

TEST_CASE("importance is kept in a file, and spends the bits where it is") {
    const scratch_folder scratch;
    const std::string name = "blk.0.ffn_gate.weight", experts = "blk.1.ffn_down_exps.weight";
    const auto& gate = source().require(name);
    const auto& down = source().require(experts);
    keel::importance_matrix collected;
    std::vector<float> row(static_cast<std::size_t>(gate.dims[0]), 0.1f);
    for (std::size_t i = 0; i < row.size(); i += 8) row[i] = 20.0f;
    collected.add(name, 1, 0, row);
    std::vector<float> half = row;
    for (float& x : half) x = 0.0f;
    collected.add(name, 1, 0, half);
    collected.add(experts, down.dims[2], 1, std::vector<float>(static_cast<std::size_t>(down.dims[0]), 3.0f));
    collected.save(scratch / "imatrix.gguf", keel::existing_file::keep, "some text", 2, 512);

    const auto read = keel::importance_matrix::open(scratch / "imatrix.gguf");
    CHECK(read.size() == 2);
    const std::vector<float> weights = read.of(gate);
    REQUIRE(weights.size() == row.size());
    CHECK(weights[0] == 200.0f);  // the mean over two rows
    CHECK(std::fabs(weights[1] - 0.005f) < 1e-6f);
    const std::vector<float> of_experts = read.of(down);
    REQUIRE(of_experts.size() == static_cast<std::size_t>(down.dims[0] * down.dims[2]));
    CHECK(of_experts[0] == 1.0f);  // nobody chose expert 0
    CHECK(of_experts[static_cast<std::size_t>(down.dims[0])] == 9.0f);
    CHECK(read.of(source().require("output.weight")).empty());

    keel::requantize(source(), scratch / "plain.gguf", {.type = "q4_0"});
    keel::requantize(source(), scratch / "weighted.gguf", {.type = "q4_0", .importance = &read});
    const auto plain = keel::gguf::open(scratch / "plain.gguf"), weighted = keel::gguf::open(scratch / "weighted.gguf");
    CHECK(distance(values(gate), values(weighted.require(name)), weights) <
          0.8 * distance(values(gate), values(plain.require(name)), weights));
    CHECK(values(plain.require("output.weight")) == values(weighted.require("output.weight")));
}

TEST_CASE("importance matrices that are damaged or of another model are refused") {
    const scratch_folder scratch;
    expect_error(errc::format, {"mid-bf16.gguf", "general.type"},
                 [] { keel::importance_matrix::open(KEEL_TEST_DATA "/models/mid-bf16.gguf"); });

    const std::string name = "blk.0.ffn_gate.weight";
    keel::importance_matrix other;
    other.add(name, 1, 0, std::vector<float>(64, 1.0f));
    expect_error(errc::format, {name, "fit"},
                 [&] { keel::requantize(source(), scratch / "out.gguf", {.importance = &other}); });
    const auto write = [&](float sum, std::vector<keel::index> counts) {
        keel::gguf_writer to(scratch / "bad.gguf", keel::existing_file::replace);
        to.set("general.type", "imatrix");
        const std::vector<keel::index> dims = {4, 3};
        to.declare(name + ".in_sum2", dtype::f32, dims);
        if (!counts.empty()) to.declare(name + ".counts", dtype::f32, counts);
        std::vector<float> sums(12, sum), ones(counts.empty() ? 0 : static_cast<std::size_t>(counts[1]), 1.0f);
        to.write(name + ".in_sum2", std::as_bytes(std::span(sums)));
        if (!counts.empty()) to.write(name + ".counts", std::as_bytes(std::span(ones)));
        to.finish();
        expect_error(errc::format, {"bad.gguf", name}, [&] { keel::importance_matrix::open(scratch / "bad.gguf"); });
    };
    write(1, {});
    write(1, {1, 2});
    write(-1, {1, 3});
    write(INFINITY, {1, 1});
}
