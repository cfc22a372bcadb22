// The context attention kernel on the CPU, as a shared library for tests/csrc/test_context_attention.py:
//   c++ -std=c++17 -O2 -shared -fPIC -DMSDD_EMULATE -Icsrc/include -Icsrc/tests
//   csrc/tests/emulate_context_attention.cpp
#include <cstdint>
#include <cstdlib>
#include <functional>

#include "msdd_fast/detail/context_attention_kernel.h"

namespace {

using msdd_fast::BFloat16;
using msdd_fast::Float16;
using msdd_fast::Word;
using msdd_fast::context::Arguments;
using msdd_fast::emulation::Machine;
using msdd_fast::emulation::machine;

using Body = void (*)(const Arguments&, unsigned, unsigned, Word);

std::function<void(unsigned)> work;  // of one thread

void enter() {
    work(static_cast<unsigned>(machine->current));
    machine->fiber().done = true;
    --machine->live;
}

// Runs one thread block; `turns`: the order in which its threads run, 0 rising, 1 falling.
void run_block(Machine& m, int threads, std::size_t bytes, int turns) {
    m.memory.assign(bytes, 0xFF);  // NaN
    m.read.assign(bytes / 4, {});
    m.written.assign(bytes / 4, {});
    m.pending.assign(bytes / 4, false);
    m.fibers.resize(static_cast<std::size_t>(threads));
    m.warps.assign(static_cast<std::size_t>(threads / 32), {});
    m.live = threads;
    for (auto& fiber : m.fibers) {
        fiber.done = false;
        fiber.open.clear();
        fiber.groups.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &m.scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    while (m.live > 0) {
        for (int i = 0; i < threads; ++i) {
            m.current = turns == 0 ? i : threads - 1 - i;
            if (!m.fiber().done) swapcontext(&m.scheduler, &m.fiber().context);
        }
    }
}

template <class T>
Body body_for(int chunks, bool masked) {
    using msdd_fast::context::attend;
    if (chunks == 4) return attend<T, 4, true>;
    if (chunks == 3) return masked ? attend<T, 3, true> : attend<T, 3, false>;
    return masked ? attend<T, 2, true> : attend<T, 2, false>;
}

}  // namespace

extern "C" {

// views: q, k, v, accumulate, out, each (address or 0, strides of batch, token, head); extents: first address and bytes
// of each one's memory; writes: a counter for every 16 bytes of out's. faults: divergences, accesses outside,
// misaligned, bank conflicts, races.
void emulate(const std::int64_t (*views)[4], const std::int64_t (*extents)[2], std::int64_t images, std::int64_t heads,
             std::int64_t queries, std::int64_t keys, int bf16, int splits, int turns, int early, std::int32_t* writes,
             std::int64_t* faults) {
    const auto view = [&](int i) {
        const auto& x = views[i];
        return msdd_fast::HeadsView{reinterpret_cast<void*>(x[0]), x[1], x[2], x[3]};
    };
    const Arguments a{{view(0), view(1), view(2), view(3), view(4), images, heads, queries, keys}, splits};
    Machine m;
    machine = &m;
    for (int i = 0; i < 4; ++i) {
        m.readable.push_back({reinterpret_cast<const char*>(extents[i][0]), extents[i][1]});
    }
    m.writable = {reinterpret_cast<const char*>(extents[4][0]), extents[4][1]};
    m.writes = writes;
    m.early = early != 0;
    const int chunks = msdd_fast::context::chunks_for(keys);
    const bool masked = keys < chunks * msdd_fast::context::kChunk;
    const Body body = bf16 ? body_for<BFloat16>(chunks, masked) : body_for<Float16>(chunks, masked);
    for (unsigned block = 0; block < images * heads * splits; ++block) {
        work = [&](unsigned thread) { body(a, block, thread, 0); };
        const int bytes = msdd_fast::context::shared_bytes(chunks);
        run_block(m, msdd_fast::context::kThreads, static_cast<std::size_t>(bytes), turns);
    }
    const std::int64_t found[] = {m.divergences, m.outside, m.misaligned, m.conflicts, m.races};
    std::copy(std::begin(found), std::end(found), faults);
}

// One warp's multiply_add<BFloat16> on the registers of its lanes, c in place.
void emulate_multiply_add(const Word (*a)[4], const Word (*b)[2], float (*c)[4]) {
    Machine m;
    machine = &m;
    work = [&](unsigned lane) { msdd_fast::multiply_add<BFloat16>(c[lane], a[lane], b[lane][0], b[lane][1]); };
    run_block(m, 32, 4, 0);
}

// One warp's load_matrices from 512 bytes, lane i giving the address 16 * i.
void emulate_load_matrices(const void* bytes, int transposed, Word (*to)[4]) {
    Machine m;
    machine = &m;
    work = [&](unsigned lane) {
        std::memcpy(&m.memory[16 * lane], static_cast<const char*>(bytes) + 16 * lane, 16);
        msdd_fast::sync_warp();
        transposed ? msdd_fast::load_matrices_transposed(to[lane], 16 * lane)
                   : msdd_fast::load_matrices(to[lane], 16 * lane);
    };
    run_block(m, 32, 512, 0);
}
}
