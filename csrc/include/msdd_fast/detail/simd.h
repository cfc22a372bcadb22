// One source, several SIMD levels, chosen when the library is loaded: the binary runs on every x86-64 and uses
// the widest vectors available. Compilers and platforms without ifunc get plain code.
#pragma once

// Tests define this as nothing and build one level by -march, to compare levels.
#ifndef MSDD_SIMD_CLONES
// glibc gives us ifunc; clang spells the levels differently from release to release, so it gets plain code. So does
// ThreadSanitizer, which is not there yet when the loader chooses.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_THREAD__)
#define MSDD_SIMD_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define MSDD_SIMD_DISPATCH  // also select code with intrinsics at run time
#else
#define MSDD_SIMD_CLONES
#endif
#endif
