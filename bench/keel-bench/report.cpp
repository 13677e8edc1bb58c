// SPDX-License-Identifier: MIT
#include "report.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/utsname.h>
#endif

#include <keel/version.hpp>

#include "measure.hpp"

namespace bench {

namespace {

using nlohmann::ordered_json;

std::string processor_name() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        if (line.starts_with("model name")) return line.substr(line.find(": ") + 2);
    }
    return "unknown processor";
}

std::string system_name() {
#if defined(__unix__) || defined(__APPLE__)
    utsname about{};
    if (::uname(&about) == 0) return std::string(about.sysname) + " " + about.release + " " + about.machine;
#endif
    return "unknown system";
}

/// How much of a limit was reached; nothing if the limit is unknown.
ordered_json share(double reached, double limit) {
    return limit > 0 && reached > 0 ? ordered_json(reached / limit) : ordered_json();
}

std::vector<double> scaled(std::vector<double> values, double factor) {
    for (double& x : values) x *= factor;
    return values;
}

ordered_json record(const options& o, const machine& m) {
    return {{"keel", KEEL_VERSION},
            {"processor", m.processor},
            {"system", m.system},
            {"threads", m.threads},
            {"backend", o.backend},
            {"instruction_set", m.instruction_set},
            {"precision", o.precision},
            {"interleave", o.interleave},
            {"read_gb_s", m.most.bytes_per_second / 1e9},
            {"integer_gop_s", m.most.integer_operations_per_second / 1e9},
            {"float_gop_s", m.most.float_operations_per_second / 1e9}};
}

std::string text(const ordered_json& value, const char* format, double factor = 1) {
    if (value.is_null()) return "";
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, format, factor * value.get<double>());
    return buffer;
}

void print_machine(const ordered_json& about) {
    std::printf("keel %s, %s, %d threads, %s, %s, %s\n", about["keel"].get<std::string>().c_str(),
                about["processor"].get<std::string>().c_str(), about["threads"].get<int>(),
                about["backend"].get<std::string>().c_str(), about["instruction_set"].get<std::string>().c_str(),
                about["precision"].get<std::string>().c_str());
    if (about["read_gb_s"] > 0) {
        std::printf("limits: reads %.1f GB/s, integer %.0f Gop/s, float %.0f Gop/s\n", about["read_gb_s"].get<double>(),
                    about["integer_gop_s"].get<double>(), about["float_gop_s"].get<double>());
    }
}

/// Rows of the same keys, with the record's in front of each.
void print_csv(const ordered_json& about, const ordered_json& rows) {
    const auto line = [](const ordered_json& first, const ordered_json& second, auto&& cell) {
        std::string out;
        for (const auto* part : {&first, &second}) {
            for (const auto& [key, value] : part->items()) {
                if (!value.is_array()) out.append(out.empty() ? "" : ",").append(cell(key, value));
            }
        }
        std::cout << out << '\n';
    };
    if (!rows.empty()) line(about, rows[0], [](const std::string& key, const auto&) { return key; });
    for (const auto& row : rows) {
        line(about, row, [](const std::string&, const auto& value) { return value.is_null() ? "" : value.dump(); });
    }
}

/// The record with its rows under `name` as JSON, or as CSV, or what table() prints below the machine.
template <class Table>
void print_rows(const std::string& format, ordered_json& about, const char* name, const ordered_json& rows,
                Table&& table) {
    if (format == "json") {
        about[name] = rows;
        std::cout << about.dump(1) << '\n';
    } else if (format == "csv") {
        print_csv(about, rows);
    } else {
        print_machine(about);
        table();
    }
}

}  // namespace

machine describe_machine(const runner& r, bool with_limits) {
    return {processor_name(), system_name(), r.threads(), r.instruction_set(),
            with_limits ? r.measure_limits() : limits{}};
}

double result::spread() const {
    double mean = 0, squares = 0;
    for (const double x : tokens_per_second) mean += x / static_cast<double>(tokens_per_second.size());
    for (const double x : tokens_per_second) squares += (x - mean) * (x - mean);
    return tokens_per_second.size() < 2 ? 0 : std::sqrt(squares / static_cast<double>(tokens_per_second.size() - 1));
}

double result::share_of_reading() const {
    std::vector<double> shares;
    for (std::size_t i = 0; i < reading.size(); ++i) {
        shares.push_back(tokens_per_second[i] * bytes_per_token / reading[i]);
    }
    return shares.empty() ? 0 : median(shares);
}

void print(const std::string& format, const options& o, const machine& m, const model& measured, double load_seconds,
           const std::vector<result>& results) {
    ordered_json about = record(o, m);
    about["model"] = std::filesystem::path(o.model).filename().string();
    about["model_name"] = measured.name();
    about["model_bytes"] = measured.bytes();
    about["parameters"] = measured.parameters();
    about["load_seconds"] = load_seconds;

    // Exact arithmetic and files of floats are up against the rate of floats.
    const bool integers = o.precision == "fast" && 8 * measured.bytes() / measured.parameters() < 9;
    const double most = integers ? m.most.integer_operations_per_second : m.most.float_operations_per_second;
    ordered_json rows = ordered_json::array();
    for (const result& r : results) {
        const double rate = median(r.tokens_per_second);
        const double bytes = rate * r.bytes_per_token, operations = rate * r.operations_per_token;
        rows.push_back({{"test", r.test},
                        {"tokens", r.tokens},
                        {"depth", r.depth},
                        {"tok_s", rate},
                        {"spread", r.spread()},
                        {"gb_s", bytes > 0 ? ordered_json(bytes / 1e9) : ordered_json()},
                        {"share_of_reading", share(r.share_of_reading(), 1)},
                        {"gop_s", operations / 1e9},
                        {"share_of_arithmetic", share(operations, most)},
                        {"samples", r.tokens_per_second},
                        {"reading_gb_s", scaled(r.reading, 1e-9)}});
    }
    print_rows(format, about, "results", rows, [&] {
        std::printf("%s: %.2f GiB, loaded in %.2f s\n\n", about["model"].get<std::string>().c_str(),
                    measured.bytes() / 0x1p30, load_seconds);
        std::printf("| test | depth | tok/s | | GB/s | of limit | Gop/s | of limit |\n");
        std::printf("|---|---:|---:|---|---:|---:|---:|---:|\n");
        for (const auto& r : rows) {
            std::printf("| %s %d | %d | %.1f | ± %.1f | %s | %s | %.0f | %s |\n", r["test"].get<std::string>().c_str(),
                        r["tokens"].get<int>(), r["depth"].get<int>(), r["tok_s"].get<double>(),
                        r["spread"].get<double>(), text(r["gb_s"], "%.1f").c_str(),
                        text(r["share_of_reading"], "%.0f %%", 100).c_str(), r["gop_s"].get<double>(),
                        text(r["share_of_arithmetic"], "%.0f %%", 100).c_str());
        }
    });
}

void print(const std::string& format, const options& o, const machine& m, const std::vector<operation>& operations) {
    ordered_json about = record(o, m);
    ordered_json rows = ordered_json::array();
    for (const operation& op : operations) {
        const double bytes = op.bytes / op.seconds, rate = op.operations / op.seconds;
        const double most = op.integer ? m.most.integer_operations_per_second : m.most.float_operations_per_second;
        rows.push_back({{"operation", op.name},
                        {"microseconds", 1e6 * op.seconds},
                        {"gb_s", bytes / 1e9},
                        {"share_of_reading", share(bytes, m.most.bytes_per_second)},
                        {"gop_s", rate > 0 ? ordered_json(rate / 1e9) : ordered_json()},
                        {"share_of_arithmetic", share(rate, most)}});
    }
    print_rows(format, about, "operations", rows, [&] {
        std::printf("\n| operation | µs | GB/s | of limit | Gop/s | of limit |\n|---|---:|---:|---:|---:|---:|\n");
        for (const auto& r : rows) {
            std::printf("| %s | %.0f | %.2f | %s | %s | %s |\n", r["operation"].get<std::string>().c_str(),
                        r["microseconds"].get<double>(), r["gb_s"].get<double>(),
                        text(r["share_of_reading"], "%.0f %%", 100).c_str(), text(r["gop_s"], "%.1f").c_str(),
                        text(r["share_of_arithmetic"], "%.0f %%", 100).c_str());
        }
    });
}

void print(const std::string& format, const options& o, const machine& m, const std::vector<comparison>& comparisons) {
    ordered_json about = record(o, m);
    about["model"] = std::filesystem::path(o.model).filename().string();
    ordered_json rows = ordered_json::array();
    for (const comparison& c : comparisons) {
        rows.push_back({{"test", c.test},
                        {"value", c.value},
                        {"unit", c.unit},
                        {"beside", c.beside},
                        {"other", c.other},
                        {"ratio", c.value / c.other}});
    }
    print_rows(format, about, "comparisons", rows, [&] {
        std::printf("\n| test | | beside | | ratio |\n|---|---:|---|---:|---:|\n");
        for (const auto& r : rows) {
            const std::string unit = " " + r["unit"].get<std::string>();
            std::printf("| %s | %s | %s | %s | %s |\n", r["test"].get<std::string>().c_str(),
                        (text(r["value"], "%.4g") + unit).c_str(), r["beside"].get<std::string>().c_str(),
                        (text(r["other"], "%.4g") + unit).c_str(), text(r["ratio"], "%.3f").c_str());
        }
    });
}

}  // namespace bench
