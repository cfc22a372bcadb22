// A parallel loop on the threads of PyTorch's OpenMP team, or else on a pool of our own.
//
// Why not link OpenMP: torch ships its own libgomp inside the wheel. The system's would be a second OpenMP runtime in
// the process, whose spinning pool competes with torch's for the same cores. The team that is there is found when the
// library is first used; without one (no torch, another runtime, after fork()) the pool serves. Why not start
// std::thread per call: each start costs 20 to 50 us, more than the work of a small image.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

namespace msdd_fast {

// Runs task(0) .. task(count - 1), none of which may start tasks itself, each once, on the caller and on up to count -
// 1 other threads. Returns when all are done; if tasks have thrown, one of their exceptions is thrown on then.
void run_tasks(std::int64_t count, const std::function<void(std::int64_t)>& task);

// Runs each of the bodies once, at the same time, on `threads` threads, the caller's included. A thread that has no
// body stands by for the tasks that the others start: run_tasks then costs about a microsecond, not a fork and a join.
// An exception of a body is thrown on once all have ended.
void run_on_teams(int threads, const std::vector<std::function<void()>>& bodies);

// Whether the calling thread leads a team that stands by.
bool leads_a_team();

// A team that stands by is worth smaller parts than a fork and a join are.
constexpr std::int64_t TEAM_GRAIN_DIVISOR = 16;

// Calls body(begin, end) on contiguous parts of [0, count), at least `grain` items each, on at most `threads`
// threads, the caller's included. Exceptions of `body` as those of tasks.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Body& body) {
    if (leads_a_team()) grain = std::max<std::int64_t>(1, grain / TEAM_GRAIN_DIVISOR);
    const std::int64_t parts = std::min<std::int64_t>(threads, count / grain);
    if (parts <= 1) return body(std::int64_t{0}, count);
    run_tasks(parts, [&](std::int64_t part) { body(count * part / parts, count * (part + 1) / parts); });
}

// Threads for `work` of which `grain` is worth a thread: 1 to `threads`.
inline int threads_for(std::int64_t work, std::int64_t grain, int threads) {
    return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, work / grain)));
}

// Calls body(part, task) for tasks 0 .. tasks - 1, each once, on `parts` threads, which are parts 0 .. parts - 1. Each
// begins with its own range of tasks and then takes what is left of the others': neighbouring tasks, which share their
// data, stay on one core, and a thread that comes late leaves its share to the others.
template <class Body>
void share_tasks(std::int64_t tasks, std::int64_t parts, const Body& body) {
    struct alignas(64) Range {
        std::atomic<std::int64_t> next;
        std::int64_t end;
    };
    constexpr std::int64_t MOST = 64;
    Range ranges[MOST];
    const std::int64_t count = std::min(parts, MOST);
    for (std::int64_t i = 0; i < count; ++i) {
        ranges[i].next.store(tasks * i / count, std::memory_order_relaxed);
        ranges[i].end = tasks * (i + 1) / count;
    }
    parallel_for(parts, 1, static_cast<int>(parts), [&](std::int64_t part, std::int64_t) {
        for (std::int64_t i = 0; i < count; ++i) {
            Range& range = ranges[(part + i) % count];
            for (std::int64_t task; (task = range.next++) < range.end;) body(part, task);
        }
    });
}

}  // namespace msdd_fast
