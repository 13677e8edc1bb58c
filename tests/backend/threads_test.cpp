// SPDX-License-Identifier: MIT
#include <keel/backend/cpu/threads.hpp>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "catch.hpp"

namespace keel::testing {

TEST_CASE("share_of cuts tasks into consecutive parts, in multiples of the grain") {
    for (const index tasks : {0, 1, 5, 16, 1000}) {
        for (const int threads : {1, 2, 3, 7, 64}) {
            for (const index grain : {1, 4, 16}) {
                CAPTURE(tasks, threads, grain);
                index next = 0;
                for (int t = 0; t < threads; ++t) {
                    const row_range part = share_of(tasks, t, threads, grain);
                    CHECK(part.count >= 0);
                    CHECK((part.count == 0 || part.first == next));
                    CHECK((part.first % grain == 0 || part.count == 0));
                    CHECK(part.count <= (tasks / threads / grain + 2) * grain);
                    next += part.count;
                }
                CHECK(next == tasks);
            }
        }
    }
}

TEST_CASE("dealt work is all done, once, also by a share that comes before all others") {
    for (const index total : {0, 1, 7, 64, 1000, 12345}) {
        for (const int shares : {1, 2, 3, 16}) {
            CAPTURE(total, shares);
            dealt_work work(total);
            std::vector<int> done(static_cast<std::size_t>(total));
            std::vector<index> count(static_cast<std::size_t>(shares));
            for (int share = 0; share < shares; ++share) {  // in turns: the first takes all that is not anybody's own
                work.run(share, shares, [&](index from, index to) {
                    CHECK(from < to);
                    count[static_cast<std::size_t>(share)] += to - from;
                    for (index i = from; i < to; ++i) ++done[static_cast<std::size_t>(i)];
                });
            }
            CHECK(done == std::vector<int>(static_cast<std::size_t>(total), 1));
            const index part = total / shares;
            CHECK(count[0] >= part + (shares - 1) * part / 8 - 2 * shares);
            for (std::size_t share = 1; share < count.size(); ++share) CHECK(count[share] >= part * 7 / 8 - 1);
        }
    }
}

TEST_CASE("a job's shares are all run, once, before it returns") {
    for (const int threads : {1, 2, 5}) {
        thread_pool pool(threads);
        CHECK(pool.size() == threads);
        std::vector<int> runs(static_cast<std::size_t>(threads));  // each share writes its own
        for (int round = 1; round <= 2000; ++round) {
            pool.parallel([&](int share, int shares) {
                if (shares == threads) ++runs[static_cast<std::size_t>(share)];
            });
            CHECK(runs == std::vector<int>(static_cast<std::size_t>(threads), round));
            if (round % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // let the workers sleep
        }
    }
}

TEST_CASE("parallel_for calls each task once") {
    thread_pool pool(3);
    for (const index tasks : {0, 1, 2, 3, 100}) {
        std::vector<int> calls(static_cast<std::size_t>(tasks));
        pool.parallel_for(tasks, [&](index i) { ++calls[static_cast<std::size_t>(i)]; });
        CHECK(calls == std::vector<int>(static_cast<std::size_t>(tasks), 1));
    }
}

TEST_CASE("a pool without a number has a thread for each core that it may use") {
    const thread_pool pool;
    CHECK(pool.size() >= 1);
    CHECK(pool.size() <= static_cast<int>(std::thread::hardware_concurrency()));
}

TEST_CASE("an exception comes back to the caller, after which the pool goes on") {
    for (const int threads : {1, 4}) {
        thread_pool pool(threads);
        for (int round = 0; round < 100; ++round) {
            std::string caught;
            try {
                pool.parallel([&](int share, int) {
                    if (share == 0 || share == 2) throw std::runtime_error("share " + std::to_string(share));
                });
            } catch (const std::runtime_error& e) {
                caught = e.what();
            }
            CHECK(caught == "share 0");
            std::atomic<int> sum{0};
            pool.parallel([&](int share, int) { sum += share + 1; });
            CHECK(sum == threads * (threads + 1) / 2);
        }
    }
}

TEST_CASE("several host threads share a pool, one job at a time") {
    thread_pool pool(3);
    std::atomic<int> inside{0}, most{0}, shares{0};
    std::vector<std::thread> hosts;
    for (int h = 0; h < 4; ++h) {
        hosts.emplace_back([&] {
            for (int round = 0; round < 500; ++round) {
                pool.parallel([&](int, int) {
                    const int now = ++inside;
                    int seen = most;
                    while (now > seen && !most.compare_exchange_weak(seen, now)) {
                    }
                    ++shares;
                    --inside;
                });
            }
        });
    }
    for (std::thread& host : hosts) host.join();
    CHECK(shares == 4 * 500 * 3);
    CHECK(most <= 3);
}

}  // namespace keel::testing
