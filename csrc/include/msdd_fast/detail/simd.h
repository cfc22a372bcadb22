// One source, several SIMD levels, chosen when the library is loaded: the binary runs on every x86-64 and still
// uses the vectors it finds. Where the compiler or the platform lacks this, plain code remains.
#pragma once

// Defined beforehand (as nothing) to build one level by -march: so the tests compare the levels.
#ifndef MSDD_SIMD_CLONES
// glibc gives us ifunc; clang spells the levels differently from release to release, so it gets plain code.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MSDD_SIMD_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define MSDD_SIMD_DISPATCH  // for what needs instructions of its own
#else
#define MSDD_SIMD_CLONES
#endif
#endif
