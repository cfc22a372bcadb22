#include "msdd_fast/program.h"

#include <atomic>
#include <cstring>

#include "msdd_fast/detail/parallel.h"

namespace msdd_fast {
namespace {

void* image_of(void* batch, std::int64_t image, std::size_t bytes) {
    return static_cast<char*>(batch) + static_cast<std::size_t>(image) * bytes;
}

}  // namespace

void Program::run() const {
    for (const auto& call : calls_) call();
}

void Program::replay(int threads) const {
    run_on_teams(threads, {[this] { run(); }});
}

void replay_images(const std::vector<ImageProgram>& programs, std::int64_t images, int threads) {
    std::atomic<std::int64_t> next{0};
    const auto work = [&](const ImageProgram& p) {
        for (std::int64_t image; (image = next++) < images;) {
            for (const auto& [own, batch, bytes] : p.inputs) std::memcpy(own, image_of(batch, image, bytes), bytes);
            p.program->run();
            for (const auto& [own, batch, bytes] : p.results) std::memcpy(image_of(batch, image, bytes), own, bytes);
        }
    };
    std::vector<std::function<void()>> bodies;
    for (const ImageProgram& program : programs) bodies.emplace_back([&] { work(program); });
    run_on_teams(threads, bodies);
}

Program*& recording() {
    thread_local Program* current = nullptr;
    return current;
}

}  // namespace msdd_fast
