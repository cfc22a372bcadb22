// A parallel loop on std::thread.
//
// Why not OpenMP: torch ships its own libgomp inside the wheel. Linking the system's would put a second OpenMP
// runtime in the process, whose pool competes with torch's for the same cores and breaks after fork(). Starting a
// thread costs about 20 us, so a loop brings along the amount of work for which another thread pays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace msdd_fast {

// Calls body(begin, end) on contiguous parts of [0, count), at least `grain` items each, on at most `threads`
// threads, the caller's included. `body` must not throw.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Body& body) {
    const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, count / grain));
    std::vector<std::thread> workers;
    workers.reserve(static_cast<std::size_t>(parts - 1));
    std::int64_t begin = 0;
    for (std::int64_t part = 0; part + 1 < parts; ++part) {
        const std::int64_t end = count * (part + 1) / parts;
        try {
            workers.emplace_back([&body, begin, end] { body(begin, end); });
        } catch (const std::system_error&) {
            break;  // no more threads to be had: the caller does the rest itself
        }
        begin = end;
    }
    body(begin, count);
    for (std::thread& worker : workers) worker.join();
}

}  // namespace msdd_fast
