#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define QT_ISA avx512
#define QT_LANES 16
#define QT_FMA
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
