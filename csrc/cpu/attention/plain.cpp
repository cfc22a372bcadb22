// Attention for any machine: correct, not fast. Its vectors are as wide as those of AVX-512, so it also
// tests the panels and tiles of that level on machines without AVX-512.
#include "plain.h"

#include "kernel.h"

namespace msdd_fast {

void attention_task_plain(const AttentionJob& job, std::int64_t image, std::int64_t head, std::int64_t first,
                          std::int64_t count, float* scratch) {
    attend_any(job, image, head, first, count, scratch);
}

}  // namespace msdd_fast
