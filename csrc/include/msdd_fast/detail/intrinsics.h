// The compiler's intrinsics. gcc 12 takes the deliberately undefined registers inside them for mistakes (GCC bug
// 105593).
#pragma once

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
