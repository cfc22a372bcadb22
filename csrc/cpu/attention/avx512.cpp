// Attention by AVX-512. The plain level runs the same panels and tiles on machines without it.
#include "job.h"

#ifdef MSDD_X86_LEVELS
#define MSDD_SIMD __attribute__((target("avx512f,avx2,fma")))

#include "avx512.h"
#include "kernel.h"

namespace msdd_fast {

MSDD_SIMD void attention_task_avx512(const AttentionJob& job, std::int64_t image, std::int64_t head, std::int64_t first,
                                     std::int64_t count, float* scratch) {
    attend_any(job, image, head, first, count, scratch);
}

}  // namespace msdd_fast
#endif
