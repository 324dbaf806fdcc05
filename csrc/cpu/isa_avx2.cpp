#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define QT_ISA avx2
#define QT_LANES 8
#define QT_FMA
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
