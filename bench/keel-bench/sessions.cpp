// SPDX-License-Identifier: MIT
#include "sessions.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <utility>

#include "measure.hpp"

namespace bench {

namespace {

constexpr std::int64_t user_tokens = 200, turn_tokens = 512, answer_tokens = 32, back = 8;

/// The medians of two things, done in turns.
template <class F, class G>
std::pair<double, double> in_turns(int repetitions, F&& first, G&& second) {
    std::vector<double> a, b;
    for (int i = 0; i < repetitions; ++i) {
        a.push_back(first());
        b.push_back(second());
    }
    return {median(a), median(b)};
}

class measurements {
public:
    measurements(const model& model, std::int64_t depth, int repetitions, std::string file)
        : model_(model),
          context_(depth + 2 * turn_tokens),
          repetitions_(repetitions),
          file_(std::move(file)),
          random_(model.vocabulary()) {
        talk_ = model.start(context_);
        talk_->feed(draw(turn_tokens));  // pages, threads: what happens once does not count
        talk_->rewind(0);
        while (held() + turn_tokens + user_tokens + answer_tokens <= depth) {
            say(user_tokens);
            say(turn_tokens - user_tokens);
        }
        last_turn_ = held();
        say(depth - answer_tokens - last_turn_);
        for (int i = 0; i < answer_tokens; ++i) say(1);  // as it is drawn
    }

    std::vector<comparison> all() {
        fork();
        rewind();
        disk();
        batch(8);
        edit();
        return std::move(found_);
    }

private:
    std::int64_t held() const { return static_cast<std::int64_t>(tokens_.size()); }
    std::vector<std::int32_t> draw(std::int64_t n) { return random_.draw(n); }

    void say(std::int64_t n) {
        const auto more = draw(n);
        tokens_.insert(tokens_.end(), more.begin(), more.end());
        spent_ += seconds([&] { talk_->feed(more); });
    }

    /// As if for so many continuations: all of them are kept, so that each goes to new memory.
    void fork() {
        const auto size = static_cast<std::size_t>(model_.state_bytes());
        const std::vector<char> state(size, 1);
        std::vector<std::unique_ptr<session>> forks;
        std::vector<std::unique_ptr<char[]>> copies;
        const auto [forked, copied] = in_turns(
            5 * repetitions_, [&] { return seconds([&] { forks.push_back(talk_->fork()); }); },
            [&] {
                return seconds([&] {
                    copies.emplace_back(new char[size]);
                    std::memcpy(copies.back().get(), state.data(), size);
                });
            });
        found_.push_back({"fork", 1e3 * forked, "memcpy of the recurrent state to new memory", 1e3 * copied, "ms"});
        std::vector<double> again;
        for (const auto& copy : copies) again.push_back(seconds([&] { std::memcpy(copy.get(), state.data(), size); }));
        found_.push_back({"fork", 1e3 * forked, "memcpy to memory in use", 1e3 * median(again), "ms"});
    }

    void rewind() {
        auto talk = model_.start(turn_tokens * 4, back);
        talk->feed(draw(turn_tokens));
        const auto [gone_back, prefilled] = in_turns(
            repetitions_,
            [&] {
                const auto copy = talk->fork();
                const auto next = draw(1);
                return seconds([&] {
                    copy->rewind(turn_tokens - back);
                    copy->feed(next);
                });
            },
            [&] {
                const auto copy = talk->fork();
                const auto prompt = draw(turn_tokens);
                return seconds([&] { copy->feed(prompt); });
            });
        found_.push_back({"rewind by 8 and go on", 1e3 * gone_back, "prefill of 512", 1e3 * prefilled, "ms"});
    }

    void disk() {
        double bytes = 0;
        const auto [saved, loaded] = in_turns(
            repetitions_,
            [&] {
                const double time = seconds([&] { talk_->save(file_); });
                bytes = static_cast<double>(std::filesystem::file_size(file_));
                return time;
            },
            [&] { return seconds([&] { (void)model_.resume(file_, context_); }); });
        std::filesystem::remove(file_);
        found_.push_back({"save", bytes / saved / 1e9, "load", bytes / loaded / 1e9, "GB/s"});
    }

    void batch(std::size_t count) {
        std::vector<std::unique_ptr<session>> sessions;
        for (std::size_t i = 0; i < count; ++i) {
            sessions.push_back(talk_->fork());
            sessions.back()->feed(draw(1));
        }
        const auto answers = draw(answer_tokens * static_cast<std::int64_t>(count));
        const auto [together, alone] = in_turns(
            std::max(1, repetitions_ / 2),
            [&] {
                return seconds([&] {
                    for (std::size_t t = 0; t < answers.size(); t += count) {
                        for (std::size_t i = 0; i < count; ++i) sessions[i]->append({&answers[t + i], 1});
                        model_.step(sessions);
                    }
                });
            },
            [&] {
                return seconds([&] {
                    for (std::size_t i = 0; i < count; ++i) {
                        for (std::size_t t = i; t < answers.size(); t += count) sessions[i]->feed({&answers[t], 1});
                    }
                });
            });
        const double n = static_cast<double>(answers.size());
        found_.push_back({"decode 8 sessions together", n / together, "one after another", n / alone, "tok/s"});
    }

    void edit() {
        std::vector<std::int32_t> edited(tokens_.begin(), tokens_.begin() + last_turn_);
        const auto other = draw(user_tokens);
        edited.insert(edited.end(), other.begin(), other.end());
        std::int64_t computed = 0;
        const double time = seconds([&] { computed = talk_->sync(edited); });
        found_.push_back({"change the last user turn of 200: tokens computed", static_cast<double>(computed),
                          "tokens held", static_cast<double>(edited.size()), ""});
        found_.push_back(
            {"change the last user turn of 200", 1e3 * time, "the whole conversation", 1e3 * spent_, "ms"});
    }

    const model& model_;
    std::int64_t context_;
    int repetitions_;
    std::string file_;
    random_tokens random_;
    std::unique_ptr<session> talk_;
    std::vector<std::int32_t> tokens_;
    std::int64_t last_turn_ = 0;
    double spent_ = 0;
    std::vector<comparison> found_;
};

}  // namespace

std::vector<comparison> measure_sessions(const model& model, std::int64_t depth, int repetitions,
                                         const std::string& file) {
    return measurements(model, depth, repetitions, file).all();
}

}  // namespace bench
