// warp.h on the CPU: the same functions, executed by 32 fibers a warp that meet at every instruction of the warp.
//
// It tests a kernel's source without a GPU: lanes address and exchange data as on hardware. Besides the result it
// counts errors and hazards: addresses outside the tensors or misaligned, bank conflicts, and accesses to shared memory
// that no barrier or wait orders. Fragment layouts are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16",
// "ldmatrix"); tests/csrc/test_context_attention.py checks them against an independent implementation.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "msdd_fast/dtype.h"

#define MSDD_DEVICE inline

namespace msdd_fast {

using Word = std::uint32_t;
using std::min;

namespace emulation {

struct Copy {
    Word shared;
    const char* global;
    bool valid;
};

// Who touched a word of shared memory last, and how many barriers there had been then.
struct Mark {
    int thread = -1;
    unsigned warp_barriers = 0, block_barriers = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    bool done = false;
    std::vector<Copy> open;                 // copies since the last commit
    std::vector<std::vector<Copy>> groups;  // committed, not waited for
};

struct Slot {
    Word address, word[4];
    float value[4];
    Word a[4], b[2];
    int mask;
};

struct Warp {
    const char* instruction = nullptr;
    int arrived = 0;
    unsigned passed = 0, barriers = 0;
    Slot slot[32];
};

struct Range {
    const char* begin;
    std::int64_t bytes;
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char> memory;  // shared
    std::vector<Mark> read, written;    // by word
    std::vector<char> pending;          // word whose copy is on its way
    unsigned barriers = 0, block_passed = 0;
    int block_arrived = 0, current = 0, live = 0;
    bool early = false;  // copies arrive when they are issued, else when they are waited for
    ucontext_t scheduler;
    std::vector<Range> readable;
    Range writable{};
    std::int32_t* writes = nullptr;  // how often each 16 bytes of `writable` were written
    // What must stay 0.
    std::int64_t divergences = 0, outside = 0, misaligned = 0, conflicts = 0, races = 0;

    Fiber& fiber() { return fibers[static_cast<std::size_t>(current)]; }
    Warp& warp() { return warps[static_cast<std::size_t>(current / 32)]; }
    Slot& slot() { return warp().slot[current % 32]; }
    void yield() { swapcontext(&fiber().context, &scheduler); }
};

inline Machine* machine = nullptr;

// All lanes of the warp arrive here; the last does `work` for all.
template <class Work>
void together(const char* instruction, const Work& work) {
    Machine& m = *machine;
    Warp& warp = m.warp();
    if (warp.instruction && warp.instruction != instruction) ++m.divergences;
    warp.instruction = instruction;
    const unsigned passed = warp.passed;
    if (++warp.arrived == 32) {
        work(warp);
        warp.arrived = 0;
        warp.instruction = nullptr;
        ++warp.passed;
    } else {
        while (warp.passed == passed) m.yield();
    }
}

// Whether a barrier lies between what `mark` remembers and now, for thread `thread`.
inline bool ordered(const Mark& mark, int thread) {
    const Machine& m = *machine;
    if (mark.thread < 0 || mark.thread == thread || m.barriers > mark.block_barriers) return true;
    return mark.thread / 32 == thread / 32 &&
           m.warps[static_cast<std::size_t>(thread / 32)].barriers > mark.warp_barriers;
}

inline Mark mark_of(int thread) {
    return {thread, machine->warps[static_cast<std::size_t>(thread / 32)].barriers, machine->barriers};
}

inline void note_read(Word address, int words, int thread) {
    for (Word i = address / 4; i < address / 4 + static_cast<Word>(words); ++i) {
        if (machine->pending[i] || !ordered(machine->written[i], thread)) ++machine->races;
        machine->read[i] = mark_of(thread);
    }
}

inline void note_write(Word address, int words, int thread) {
    for (Word i = address / 4; i < address / 4 + static_cast<Word>(words); ++i) {
        if (machine->pending[i] || !ordered(machine->written[i], thread) || !ordered(machine->read[i], thread)) {
            ++machine->races;
        }
        machine->written[i] = mark_of(thread);
    }
}

inline void check_address(Word address, Word bytes) {
    if (address % bytes) ++machine->misaligned;
    if (address + bytes > machine->memory.size()) {
        ++machine->outside;
        std::abort();
    }
}

// Lanes that go to one bank in the same cycle for different addresses; wide accesses go by in groups of lanes.
inline void count_conflicts(const Warp& warp, Word bytes) {
    const int lanes = 128 / static_cast<int>(bytes);
    for (int first = 0; first < 32; first += lanes) {
        for (int i = first; i < first + lanes; ++i) {
            for (int j = first; j < i; ++j) {
                const Word x = warp.slot[i].address, y = warp.slot[j].address;
                if (x != y && x / bytes % static_cast<Word>(lanes) == y / bytes % static_cast<Word>(lanes)) {
                    ++machine->conflicts;
                }
            }
        }
    }
}

inline void arrive(const Copy& copy) {
    if (copy.valid) {
        std::memcpy(&machine->memory[copy.shared], copy.global, 16);
    } else {
        std::memset(&machine->memory[copy.shared], 0, 16);
    }
}

inline void check_global(const Range& range, const char* p, bool& inside) {
    inside = inside || (p >= range.begin && p + 16 <= range.begin + range.bytes);
}

inline void matrices(Word (&to)[4], Word address, bool transposed) {
    Slot& slot = machine->slot();
    check_address(address, 16);
    slot.address = address;
    together(transposed ? "ldmatrix.trans" : "ldmatrix", [&](Warp& warp) {
        count_conflicts(warp, 16);
        for (int i = 0; i < 4; ++i) {
            std::uint16_t matrix[8][8];
            for (int r = 0; r < 8; ++r) {
                const Word row = warp.slot[8 * i + r].address;
                std::memcpy(matrix[r], &machine->memory[row], 16);
                // Every lane receives a part of every row: it must be ordered for another than the one that wrote it.
                const int base = machine->current / 32 * 32;
                for (Word word = row / 4; word < row / 4 + 4; ++word) {
                    const int writer = machine->written[word].thread;
                    const int lane = writer == base ? base + 1 : base;
                    if (machine->pending[word] || !ordered(machine->written[word], lane)) ++machine->races;
                    machine->read[word] = mark_of(lane);
                }
            }
            for (int lane = 0; lane < 32; ++lane) {
                const int r = lane / 4, c = 2 * (lane % 4);
                const Word low = transposed ? matrix[c][r] : matrix[r][c];
                const Word high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
                warp.slot[lane].word[i] = low | high << 16;
            }
        }
    });
    std::copy(slot.word, slot.word + 4, to);
}

template <class T>
float half_of(Word word, bool high) {
    return to_float(T{static_cast<std::uint16_t>(high ? word >> 16 : word)});
}

}  // namespace emulation

inline unsigned hide(unsigned value) { return value; }

inline void sync_warp() {
    emulation::together("sync_warp", [](emulation::Warp& warp) { ++warp.barriers; });
}

inline void sync_block() {
    emulation::Machine& m = *emulation::machine;
    const unsigned passed = m.block_passed;
    if (++m.block_arrived == static_cast<int>(m.fibers.size())) {
        m.block_arrived = 0;
        ++m.barriers;
        ++m.block_passed;
    } else {
        while (m.block_passed == passed) m.yield();
    }
}

inline float shuffle_xor(float value, int mask) {
    emulation::Slot& slot = emulation::machine->slot();
    slot.value[0] = value;
    slot.mask = mask;
    emulation::together("shuffle", [](emulation::Warp& warp) {
        for (int lane = 0; lane < 32; ++lane) {
            warp.slot[lane].value[1] = warp.slot[lane ^ warp.slot[lane].mask].value[0];
        }
    });
    return slot.value[1];
}

inline void copy_async(Word shared, const void* global, bool valid) {
    emulation::Machine& m = *emulation::machine;
    const auto* source = static_cast<const char*>(global);
    emulation::check_address(shared, 16);
    if (valid) {
        bool inside = false;
        for (const emulation::Range& range : m.readable) emulation::check_global(range, source, inside);
        if (!inside) ++m.outside;
        if (reinterpret_cast<std::uintptr_t>(global) % 16) ++m.misaligned;
        valid = inside;
    }
    m.slot().address = shared;
    emulation::together("cp.async", [](emulation::Warp& warp) { emulation::count_conflicts(warp, 16); });
    emulation::note_write(shared, 4, m.current);
    std::fill_n(m.pending.begin() + shared / 4, 4, true);
    const emulation::Copy copy{shared, source, valid};
    if (m.early) emulation::arrive(copy);
    m.fiber().open.push_back(copy);
}

inline void commit_group() {
    emulation::Fiber& fiber = emulation::machine->fiber();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

template <int n>
void wait_groups() {
    emulation::Machine& m = *emulation::machine;
    auto& groups = m.fiber().groups;
    while (static_cast<int>(groups.size()) > n) {
        for (const emulation::Copy& copy : groups.front()) {
            if (!m.early) emulation::arrive(copy);
            for (Word i = copy.shared / 4; i < copy.shared / 4 + 4; ++i) {
                m.pending[i] = false;
                m.written[i] = emulation::mark_of(m.current);
            }
        }
        groups.erase(groups.begin());
    }
}

inline void load_matrices(Word (&to)[4], Word address) { emulation::matrices(to, address, false); }
inline void load_matrices_transposed(Word (&to)[4], Word address) { emulation::matrices(to, address, true); }

inline Word load_shared(Word address) {
    emulation::Machine& m = *emulation::machine;
    emulation::check_address(address, 4);
    m.slot().address = address;
    emulation::together("ld.shared", [](emulation::Warp& warp) { emulation::count_conflicts(warp, 4); });
    emulation::note_read(address, 1, m.current);
    Word value;
    std::memcpy(&value, &m.memory[address], 4);
    return value;
}

inline void store_shared(Word address, Word value) {
    emulation::Machine& m = *emulation::machine;
    emulation::check_address(address, 4);
    m.slot().address = address;
    emulation::together("st.shared", [](emulation::Warp& warp) { emulation::count_conflicts(warp, 4); });
    emulation::note_write(address, 1, m.current);
    std::memcpy(&m.memory[address], &value, 4);
}

inline void store_global(void* global, Word shared, bool valid) {
    emulation::Machine& m = *emulation::machine;
    emulation::check_address(shared, 16);
    m.slot().address = shared;
    emulation::together("ld.shared.v4", [](emulation::Warp& warp) { emulation::count_conflicts(warp, 16); });
    emulation::note_read(shared, 4, m.current);
    if (!valid) return;
    bool inside = false;
    emulation::check_global(m.writable, static_cast<const char*>(global), inside);
    if (reinterpret_cast<std::uintptr_t>(global) % 16) ++m.misaligned;
    if (!inside) {
        ++m.outside;
        return;
    }
    std::memcpy(global, &m.memory[shared], 16);
    ++m.writes[(static_cast<char*>(global) - m.writable.begin) / 16];
}

template <class T>
void multiply_add(float (&c)[4], const Word (&a)[4], Word b0, Word b1) {
    emulation::Slot& slot = emulation::machine->slot();
    std::copy(c, c + 4, slot.value);
    std::copy(a, a + 4, slot.a);
    slot.b[0] = b0;
    slot.b[1] = b1;
    emulation::together("mma", [](emulation::Warp& warp) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const emulation::Slot& s = warp.slot[lane];
            const int group = lane / 4, member = lane % 4;
            for (int i = 0; i < 8; ++i) {  // a0 to a7 and b0 to b3 in the words of the ISA
                const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
                const int column = 2 * member + i % 2 + (i < 4 ? 0 : 8);
                left[row][column] = emulation::half_of<T>(s.a[i / 2], i % 2);
            }
            for (int i = 0; i < 4; ++i) {
                right[2 * member + i % 2 + (i < 2 ? 0 : 8)][group] = emulation::half_of<T>(s.b[i / 2], i % 2);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + (i < 2 ? 0 : 8), column = 2 * (lane % 4) + i % 2;
                double sum = warp.slot[lane].value[i];
                for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
                warp.slot[lane].value[i] = static_cast<float>(sum);
            }
        }
    });
    std::copy(slot.value, slot.value + 4, c);
}

template <class T>
Word pack(float low, float high) {
    return static_cast<Word>(from_float<T>(low).bits) | static_cast<Word>(from_float<T>(high).bits) << 16;
}

template <class T>
void unpack(Word word, float& low, float& high) {
    low = emulation::half_of<T>(word, false);
    high = emulation::half_of<T>(word, true);
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

}  // namespace msdd_fast
