#include "msdd_fast/program.h"

#include "msdd_fast/detail/parallel.h"

namespace msdd_fast {

void Program::run() const {
    for (const auto& call : calls_) call();
}

void replay(const std::vector<const Program*>& programs, int threads) {
    std::vector<std::function<void()>> bodies;
    for (const Program* program : programs) bodies.emplace_back([program] { program->run(); });
    run_on_teams(threads, bodies);
}

Program*& recording() {
    thread_local Program* current = nullptr;
    return current;
}

}  // namespace msdd_fast
