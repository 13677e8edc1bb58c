// SPDX-License-Identifier: MIT
//
// Persistent threads that share one job at a time. A job is cut statically, so that who computes what is known before
// it starts; nothing that keel computes depends on how many threads there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <fstream>
#include <limits>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#include <keel/backend/batch.hpp>
#include <keel/backend/cpu/intrinsics.hpp>
#include <keel/core/compiler.hpp>
#include <keel/core/view.hpp>

namespace keel::inline KEEL_ABI {

namespace detail {

/// Tells the processor that this is a loop that waits.
inline void spin_pause() {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

/// Waits until `done()`; false if that takes longer than it is worth to burn a core for. Between two jobs of a forward
/// pass lie microseconds, so that a thread that spins this long only sleeps when the program does something else.
template <class F>
bool spin_until(F&& done) {
    constexpr auto patience = std::chrono::microseconds(100);
    for (int i = 0; i < 64; ++i) {
        if (done()) return true;
        spin_pause();
    }
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - start < patience) {
        for (int i = 0; i < 16; ++i) {
            if (done()) return true;
            spin_pause();
        }
    }
    return false;
}

#if defined(__linux__)

/// CPUs that this process may keep busy by its control groups' quotas (version 2), rounded up; INT_MAX without one.
inline int quota_of_control_group() {
    std::ifstream self("/proc/self/cgroup");
    std::string line, group;
    while (std::getline(self, line)) {
        if (line.starts_with("0::")) group = line.substr(3);
    }
    int quota = std::numeric_limits<int>::max();
    while (true) {
        std::ifstream file("/sys/fs/cgroup" + group + "/cpu.max");
        double time = 0, period = 0;
        if (file >> time >> period && period > 0) quota = std::min(quota, static_cast<int>(std::ceil(time / period)));
        if (group.empty()) return std::max(quota, 1);
        group.erase(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
    }
}

/// One per physical core among the CPUs that this thread may run on, within the control group's quota.
inline int usable_cores() {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
        return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    }
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        const std::string name = std::to_string(cpu);
        std::ifstream file("/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
        std::string siblings;
        cores.insert(std::getline(file, siblings) ? siblings : name);
    }
    return std::clamp(static_cast<int>(cores.size()), 1, quota_of_control_group());
}

#else

inline int usable_cores() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

#endif

}  // namespace detail

/// The part of `tasks` tasks that thread `thread` of `threads` works on, in multiples of `grain` but for the last.
constexpr row_range share_of(index tasks, int thread, int threads, index grain = 1) {
    const index grains = (tasks + grain - 1) / grain;
    const index first = std::min(tasks, grains * thread / threads * grain);
    return {first, std::min(tasks, grains * (thread + 1) / threads * grain) - first};
}

/// Work that is dealt out to the shares of a job: to each most of its part, in one piece, and what is left of all parts
/// in small pieces to those that are done first, since processors are seldom equally fast, least so where other
/// machines live on them.
class dealt_work {
public:
    explicit dealt_work(index total) : total_(total) {}

    /// Calls f(from, to) for ranges of [0, total) until none is left; every share of the job has to call this.
    template <class F>
    void run(int share, int shares, F&& f) {
        const auto at = [&](index piece) { return total_ * piece / (pieces * shares); };
        const auto deal = [&](index first, index last) {
            if (at(first) < at(last)) f(at(first), at(last));
        };
        deal(pieces * share, pieces * share + own);
        constexpr index spare = pieces - own;
        for (index i = 0; (i = taken_.fetch_add(1, std::memory_order_relaxed)) < spare * shares;) {
            const index piece = i / spare * pieces + own + i % spare;
            deal(piece, piece + 1);
        }
    }

private:
    static constexpr index pieces = 64, own = 56;  // of a share's part; an eighth evens out 28 % of difference

    index total_;
    std::atomic<index> taken_{0};
};

/// A fixed number of threads: the caller's own and size() - 1 workers, which sleep when there has been nothing to do
/// for a tenth of a millisecond. Several host threads may use one pool: their jobs run one after another, each with all
/// threads. A job must not start another one on its own pool.
///
/// A job has one share per thread. Whoever claims a share runs it: its worker, or the caller if it has done its own
/// share and that worker is still asleep or without a processor. So no job waits for a thread to wake up.
class thread_pool {
public:
    /// `threads` in all, the caller's included; 0: one per physical core that this process may use.
    explicit thread_pool(int threads = 0)
        : shares_(static_cast<std::size_t>(threads > 0 ? threads : detail::usable_cores())) {
        workers_.reserve(shares_.size() - 1);
        try {
            for (int thread = 1; thread < size(); ++thread) workers_.emplace_back([this, thread] { work(thread); });
        } catch (...) {
            stop();
            throw;
        }
    }
    ~thread_pool() { stop(); }
    thread_pool(const thread_pool&) = delete;
    thread_pool& operator=(const thread_pool&) = delete;

    [[nodiscard]] int size() const { return static_cast<int>(shares_.size()); }

    /// Calls f(share, shares) for each of size() shares, one share on each thread if all of them are awake, and returns
    /// when all are done. f must not wait for another share. The first exception, by number of the share, is thrown
    /// again here.
    template <class F>
    void parallel(F&& f) {
        if (size() == 1) {
            f(0, 1);
            return;
        }
        const std::unique_lock turn = take_turn();
        job_ = [](void* context, int share, int shares) {
            (*static_cast<std::remove_reference_t<F>*>(context))(share, shares);
        };
        context_ = const_cast<void*>(static_cast<const void*>(std::addressof(f)));
        unfinished_.store(size(), std::memory_order_relaxed);
        const std::uint32_t round = round_.fetch_add(1, std::memory_order_seq_cst) + 1;
        if (asleep_.load(std::memory_order_seq_cst) > 0) round_.notify_all();
        for (int share = 0; share < size(); ++share) run_if_unclaimed(share, round);
        const auto finished = [&] { return unfinished_.load(std::memory_order_acquire) == 0; };
        while (!detail::spin_until(finished)) std::this_thread::yield();
        if (failed_.load(std::memory_order_relaxed)) rethrow();
    }

    /// Calls f(task) for each of `tasks` tasks; each share has consecutive ones.
    template <class F>
    void parallel_for(index tasks, F&& f) {
        if (tasks <= 1) {
            if (tasks == 1) f(index{0});
            return;
        }
        parallel([&](int share, int shares) {
            const row_range mine = share_of(tasks, share, shares);
            for (index task = mine.first; task < mine.first + mine.count; ++task) f(task);
        });
    }

private:
    struct alignas(64) share_state {
        std::atomic<std::uint32_t> round{0};  // the last in which it was claimed
        std::exception_ptr error;
    };

    std::unique_lock<std::mutex> take_turn() {
        std::unique_lock turn(turn_, std::try_to_lock);
        if (!turn && !detail::spin_until([&] { return turn.try_lock(); })) turn.lock();
        return turn;
    }

    void run_if_unclaimed(int share, std::uint32_t round) noexcept {
        share_state& state = shares_[static_cast<std::size_t>(share)];
        std::uint32_t previous = round - 1;
        if (!state.round.compare_exchange_strong(previous, round, std::memory_order_acq_rel)) return;
        try {
            job_(context_, share, size());
        } catch (...) {
            state.error = std::current_exception();
            failed_.store(true, std::memory_order_relaxed);
        }
        unfinished_.fetch_sub(1, std::memory_order_release);
    }

    void rethrow() {
        std::exception_ptr first;
        for (share_state& state : shares_) {
            const std::exception_ptr taken = std::exchange(state.error, nullptr);
            if (!first) first = taken;
        }
        failed_.store(false, std::memory_order_relaxed);
        std::rethrow_exception(first);
    }

    void work(int thread) {
        std::uint32_t seen = 0;
        while (true) {
            if (!detail::spin_until([&] { return round_.load(std::memory_order_acquire) != seen; })) {
                asleep_.fetch_add(1, std::memory_order_seq_cst);
                round_.wait(seen, std::memory_order_seq_cst);
                asleep_.fetch_sub(1, std::memory_order_relaxed);
            }
            seen = round_.load(std::memory_order_acquire);
            if (stopping_.load(std::memory_order_relaxed)) return;
            run_if_unclaimed(thread, seen);
        }
    }

    void stop() {
        stopping_ = true;
        round_.fetch_add(1, std::memory_order_seq_cst);
        round_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    std::mutex turn_;
    void (*job_)(void*, int, int) = nullptr;  // as context_, written before a round begins
    void* context_ = nullptr;
    std::vector<share_state> shares_;
    std::atomic<bool> failed_{false};
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<std::uint32_t> round_{0};
    alignas(64) std::atomic<int> unfinished_{0};
    std::atomic<int> asleep_{0};
    std::vector<std::thread> workers_;
};

}  // namespace keel::inline KEEL_ABI
