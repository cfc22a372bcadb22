// Argument checks, run before any memory is touched.
#pragma once

#include <stdexcept>
#include <string>

namespace msdd_fast {

inline void expect(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

inline void expect_threads(int threads) {
    expect(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
}

}  // namespace msdd_fast
