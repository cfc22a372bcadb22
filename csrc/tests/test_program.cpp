// Recorded programs: every task of every call runs once and in order, on any number of threads.
//
//   test_program [REPLAYS]     of the tests that look for races; fewer under a sanitizer
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/program.h"

namespace {

void check(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "FAILED: %s\n", what);
    std::exit(1);
}

// Call i adds 1 to every element, in `parts` tasks, once all elements are i: a call that overtakes another is seen.
msdd_fast::Program counting(std::vector<int>& values, int calls, std::atomic<bool>& ordered) {
    msdd_fast::Program program;
    for (int i = 0; i < calls; ++i) {
        program.add([&values, &ordered, i] {
            msdd_fast::parallel_for(static_cast<std::int64_t>(values.size()), 1, 1 + i % 7,
                                    [&](std::int64_t begin, std::int64_t end) {
                                        for (std::int64_t k = begin; k < end; ++k)
                                            if (values[static_cast<std::size_t>(k)]++ != i) ordered = false;
                                    });
        });
    }
    return program;
}

void every_task_runs_once_and_in_order() {
    for (int threads : {1, 2, 3, 8}) {
        std::vector<int> values(97, 0);
        std::atomic<bool> ordered{true};
        const msdd_fast::Program program = counting(values, 500, ordered);
        for (int replay = 0; replay < 5; ++replay) {
            std::fill(values.begin(), values.end(), 0);
            program.replay(threads);
            for (int v : values) check(v == 500, "a task ran twice or never");
        }
        check(ordered, "a call overtook another");
    }
}

// A helper that comes late must take no task of a call by the count of the next one.
void calls_of_changing_size(int replays) {
    constexpr int MOST = 6;
    std::vector<std::atomic<int>> runs(MOST);
    std::atomic<bool> exact{true};
    msdd_fast::Program program;
    for (int i = 0; i < 2000; ++i) {
        const int count = i % 2 == 0 ? 5 : 2;
        program.add([&runs, &exact, count] {
            for (auto& run : runs) run = 0;
            msdd_fast::run_tasks(count, [&runs](std::int64_t k) { ++runs[static_cast<std::size_t>(k)]; });
            for (int k = 0; k < MOST; ++k)
                if (runs[static_cast<std::size_t>(k)] != (k < count ? 1 : 0)) exact = false;
        });
    }
    for (int threads : {2, 3, 6})
        for (int replay = 0; replay < replays; ++replay) program.replay(threads);
    check(exact, "a task ran twice or never where the number of tasks changes");
}

void several_at_once() {
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c) {
        callers.emplace_back([] {
            std::vector<int> values(33, 0);
            std::atomic<bool> ordered{true};
            counting(values, 300, ordered).replay(2);
            for (int v : values) check(v == 300 && ordered, "programs of several threads disturb each other");
        });
    }
    for (auto& caller : callers) caller.join();
}

// Tasks may throw on any thread: all others run, the caller gets one of the exceptions, and the next loop works.
void exceptions_in_tasks() {
    constexpr int TASKS = 7;
    std::atomic<int> runs{0};
    const auto failing = [&runs] {
        msdd_fast::run_tasks(TASKS, [&runs](std::int64_t i) {
            ++runs;
            if (i % 3 == 1) throw std::runtime_error("task");
        });
    };
    msdd_fast::Program program;
    program.add(failing);
    program.add([] { check(false, "a replay went on after an exception"); });
    for (int round = 0; round < 200; ++round) {
        for (int threads : {0, 1, 2, 3}) {  // 0: without a team
            runs = 0;
            bool caught = false;
            try {
                threads == 0 ? failing() : program.replay(threads);
            } catch (const std::runtime_error&) {
                caught = true;
            }
            check(caught && runs == TASKS, "an exception in a task must reach the caller once all tasks are done");
        }
        runs = 0;
        msdd_fast::run_tasks(TASKS, [&runs](std::int64_t) { ++runs; });
        check(runs == TASKS, "a loop after an exception must run all its tasks");
    }
}

// Teams come and go with every replay, and loops without a team run in between, from several threads.
void teams_beside_loops(int replays) {
    std::vector<std::thread> callers;
    for (int c = 0; c < 3; ++c) {
        callers.emplace_back([c, replays] {
            std::vector<int> values(19, 0);
            msdd_fast::Program program;
            const auto add = [&values] {
                msdd_fast::parallel_for(static_cast<std::int64_t>(values.size()), 1, 4,
                                        [&](std::int64_t begin, std::int64_t end) {
                                            for (std::int64_t k = begin; k < end; ++k)
                                                ++values[static_cast<std::size_t>(k)];
                                        });
            };
            for (int i = 0; i < 10; ++i) program.add(add);
            for (int replay = 0; replay < replays; ++replay) {
                program.replay(1 + (replay + c) % 4);
                add();
            }
            for (int v : values) check(v == 11 * replays, "loops beside a team disturb it");
        });
    }
    for (auto& caller : callers) caller.join();
}

void an_exception_ends_it() {
    msdd_fast::Program program;
    int after = 0;
    program.add([] { throw std::runtime_error("no"); });
    program.add([&after] { after = 1; });
    bool caught = false;
    try {
        program.replay(2);
    } catch (const std::runtime_error&) {
        caught = true;
    }
    check(caught && after == 0, "an exception must end the replay and reach the caller");
}

// More parts than a team has members or `share_tasks` has ranges, more parts than tasks, and none of either.
void shared_tasks_run_once() {
    for (int threads : {0, 1, 2, 3}) {  // 0: without a team
        for (int parts : {1, 2, 7, 100}) {
            for (int tasks : {0, 1, 5, 64, 1001}) {
                std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
                std::atomic<bool> in_range{true};
                const auto share = [&] {
                    msdd_fast::share_tasks(tasks, parts, [&](std::int64_t part, std::int64_t task) {
                        if (part < 0 || part >= parts) in_range = false;
                        ++runs[static_cast<std::size_t>(task)];
                    });
                };
                msdd_fast::Program program;
                program.add(share);
                threads == 0 ? share() : program.replay(threads);
                check(in_range, "a part that does not exist");
                for (auto& run : runs) check(run == 1, "a shared task ran twice or never");
            }
        }
    }
}

// Images by one program, by as many as threads, by more, and none at all; the last image takes longest, and those that
// are done help.
void images() {
    constexpr int IMAGES = 7, ROW = 33;
    struct Worker {
        int seed = 0;
        std::vector<int> row = std::vector<int>(ROW, 0);
        msdd_fast::Program program;
    };
    for (std::size_t count : {1, 2, 5}) {
        std::vector<Worker> workers(count);
        std::vector<int> seeds(IMAGES), rows(IMAGES * ROW, -1);
        std::atomic<bool> ordered{true};
        std::vector<msdd_fast::ImageProgram> all;
        for (int i = 0; i < IMAGES; ++i) seeds[static_cast<std::size_t>(i)] = 100 * i + 5;
        for (Worker& worker : workers) {
            worker.program.add([&worker] { std::fill(worker.row.begin(), worker.row.end(), 0); });
            for (int i = 0; i < 300; ++i) {
                worker.program.add([&worker, &ordered, i] {
                    if (i >= 30 && worker.seed < 100 * (IMAGES - 1)) return;
                    msdd_fast::parallel_for(ROW, 1, 1 + i % 7, [&](std::int64_t begin, std::int64_t end) {
                        for (std::int64_t k = begin; k < end; ++k)
                            if (worker.row[static_cast<std::size_t>(k)]++ != i) ordered = false;
                    });
                });
            }
            worker.program.add([&worker] {
                for (int& x : worker.row) x += worker.seed;
            });
            all.push_back({&worker.program,
                           {{&worker.seed, seeds.data(), sizeof(int)}},
                           {{worker.row.data(), rows.data(), ROW * sizeof(int)}}});
        }
        for (int replay = 0; replay < 20; ++replay) {
            std::fill(rows.begin(), rows.end(), -1);
            const int images = replay % (IMAGES + 1);
            msdd_fast::replay_images(all, images, 1 + replay % 4);
            for (int i = 0; i < IMAGES * ROW; ++i) {
                const int image = i / ROW, calls = image == IMAGES - 1 ? 300 : 30;
                const int expected = image < images ? calls + 100 * image + 5 : -1;
                check(rows[static_cast<std::size_t>(i)] == expected && ordered, "an image is not its program's result");
            }
        }
    }
    msdd_fast::Program fails, counts;
    std::atomic<int> runs{0};
    fails.add([] { throw std::runtime_error("call"); });
    counts.add([&runs] { ++runs; });
    for (int threads : {1, 2}) {
        bool caught = false;
        runs = 0;
        try {
            msdd_fast::replay_images({{&fails, {}, {}}, {&counts, {}, {}}}, 9, threads);
        } catch (const std::runtime_error&) {
            caught = true;
        }
        check(runs <= 9 && (caught ? runs == 8 : runs == 9), "an exception must reach the caller, after all images");
    }
}

double microseconds_per_call(int threads) {
    std::vector<int> values(2, 0);
    msdd_fast::Program program;
    constexpr int CALLS = 20000;
    for (int i = 0; i < CALLS; ++i)
        program.add([&values] {
            msdd_fast::parallel_for(2, 1, 2, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t k = begin; k < end; ++k) ++values[static_cast<std::size_t>(k)];
            });
        });
    const auto start = std::chrono::steady_clock::now();
    program.replay(threads);
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    return took.count() / CALLS;
}

}  // namespace

int main(int count, char** words) {
    const int replays = count > 1 ? std::atoi(words[1]) : 2000;
    every_task_runs_once_and_in_order();
    calls_of_changing_size(replays);
    several_at_once();
    teams_beside_loops(replays);
    an_exception_ends_it();
    exceptions_in_tasks();
    shared_tasks_run_once();
    images();
    std::printf("a call of two tasks: %.2f us on one thread, %.2f us on two\n", microseconds_per_call(1),
                microseconds_per_call(2));
    return 0;
}
