// Recorded programs: a list of calls with all their arguments, replayed by a team of threads without a fork and a join
// for each call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace msdd_fast {

class Program;

// Where a program keeps a tensor of its one image, and where those of a batch lie, one after the other.
struct ImageBuffer {
    void *own, *batch;
    std::size_t bytes;  // of an image
};

// A program that works on one image at a time.
struct ImageProgram {
    const Program* program;
    std::vector<ImageBuffer> inputs, results;
};

// Works on images 0 .. images - 1 of a batch, each by one of the programs: one that is done takes the next image. Uses
// up to `threads` threads, each with a program to begin with; when no image is left, a thread helps the others. An
// exception of a call ends its program, and is thrown on once all have ended.
void replay_images(const std::vector<ImageProgram>& programs, std::int64_t images, int threads);

class Program {
  public:
    // Appends a call. It must own its arguments by value; the memory that these point at is the caller's.
    void add(std::function<void()> call) { calls_.push_back(std::move(call)); }

    std::size_t size() const { return calls_.size(); }

    // Runs all calls in order, each on up to `threads` threads, the caller's included. An exception of a call ends the
    // replay and is thrown on.
    void replay(int threads) const;

    // Runs all calls in order, on the team that the caller leads, if any.
    void run() const;

  private:
    std::vector<std::function<void()>> calls_;
};

// The program that calls of this thread are being added to, or null.
Program*& recording();

}  // namespace msdd_fast
