#include "msdd_fast/program.h"

#include "msdd_fast/detail/parallel.h"

namespace msdd_fast {

void Program::replay(int threads) const {
    run_on_team(threads, [this] {
        for (const auto& call : calls_) call();
    });
}

Program*& recording() {
    thread_local Program* current = nullptr;
    return current;
}

}  // namespace msdd_fast
