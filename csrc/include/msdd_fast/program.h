// Recorded programs: a list of calls with all their arguments, replayed by a team of threads without a fork and a join
// for each call.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace msdd_fast {

class Program;

// Replays programs at the same time, on up to `threads` threads: each has one to begin with, and those that are done
// help the others. An exception of a call ends its program, and is thrown on once all have ended.
void replay(const std::vector<const Program*>& programs, int threads);

class Program {
  public:
    // Appends a call. It must own its arguments by value; the memory that these point at is the caller's.
    void add(std::function<void()> call) { calls_.push_back(std::move(call)); }

    std::size_t size() const { return calls_.size(); }

    // Runs all calls in order, each on up to `threads` threads, the caller's included. An exception of a call ends the
    // replay and is thrown on.
    void replay(int threads) const { msdd_fast::replay({this}, threads); }

    // Runs all calls in order, on the team that the caller leads, if any.
    void run() const;

  private:
    std::vector<std::function<void()>> calls_;
};

// The program that calls of this thread are being added to, or null.
Program*& recording();

}  // namespace msdd_fast
