#include "msdd_fast/attention.h"

#include <algorithm>
#include <cstdint>

#include "job.h"
#include "msdd_fast/check.h"
#include "msdd_fast/detail/parallel.h"
#include "msdd_fast/detail/scratch.h"

namespace msdd_fast {
namespace {

constexpr std::int64_t TASKS_PER_THREAD = 4;  // so that threads that wake late or lose their core cost little
constexpr std::int64_t ATTENTION_GRAIN_PRODUCTS = 1'000'000;  // multiplications worth a thread: about 0.03 ms

AttentionTask task_of(const std::string& level) {
    if (level == "plain") return attention_task_plain;
    if (level == "plain_bf16") return attention_task_plain_bf16;
#ifdef MSDD_X86_LEVELS
    if (!can_run(level)) return nullptr;
    if (level == "avx2") return attention_task_avx2;
    if (level == "avx512") return attention_task_avx512;
    if (level == "avx512bf16") return attention_task_avx512bf16;
#endif
    return nullptr;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Queries of a task: few tasks a head, since each packs the keys and values anew, but enough of them for the threads.
std::int64_t queries_per_task(const AttentionShape& shape, int threads) {
    std::int64_t tasks = ceil_div(shape.queries, TASK_QUERIES);
    const std::int64_t wanted = ceil_div(TASKS_PER_THREAD * threads, shape.batch * shape.heads);
    if (threads > 1) tasks = std::max(tasks, std::min(wanted, shape.queries / (2 * TILE_QUERIES)));
    return ceil_div(ceil_div(shape.queries, tasks), TILE_QUERIES) * TILE_QUERIES;
}

}  // namespace

std::string attention_level() {
    for (const char* level : {"avx512bf16", "avx512", "avx2"})
        if (task_of(level)) return level;
    return "plain";
}

void attention(HeadsView out, HeadsView q, HeadsView k, HeadsView v, HeadsView accumulate, DType dtype,
               const AttentionShape& shape, const std::string& level, int threads) {
    const auto& [batch, queries, keys, heads, head_size] = shape;
    expect(batch >= 0 && queries >= 0 && heads >= 0, "sizes must not be negative");
    expect(keys >= 1, "there must be a key, got " + std::to_string(keys));
    expect(head_size >= 1 && head_size <= MAX_HEAD_SIZE,
           "head size must be in [1, 128], got " + std::to_string(head_size));
    expect_threads(threads);
    const AttentionTask run = task_of(level.empty() ? attention_level() : level);
    expect(run != nullptr,
           "level must be plain, plain_bf16, avx2, avx512 or avx512bf16 and run on this machine, got " + level);
    if (batch == 0 || queries == 0 || heads == 0) return;

    const AttentionJob job{out, q, k, v, accumulate, dtype, shape};
    const std::int64_t products = 2 * batch * heads * queries * keys * head_size;
    threads = threads_for(products, ATTENTION_GRAIN_PRODUCTS, threads);
    const std::int64_t step = queries_per_task(shape, threads), per_head = ceil_div(queries, step);
    const std::int64_t tasks = batch * heads * per_head, floats = ceil_div(scratch_floats(head_size), 16) * 16;
    const std::int64_t parts = std::min<std::int64_t>(threads, tasks);
    float* const scratch = scratch_of(parts * floats);
    share_tasks(tasks, parts, [&](std::int64_t part, std::int64_t task) {
        const std::int64_t which = task / per_head, first = task % per_head * step;
        run(job, which / heads, which % heads, first, std::min(step, queries - first), scratch + part * floats);
    });
}

}  // namespace msdd_fast
