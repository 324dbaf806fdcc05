// How functions of the numerical core are declared, for host and device compilers.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define QT_HOST_DEVICE __host__ __device__ __attribute__((always_inline))
#elif defined(__GNUC__)
#define QT_HOST_DEVICE __attribute__((always_inline))
#else
#define QT_HOST_DEVICE
#endif

// Everything is `static`: the CPU kernels are compiled once per instruction set, and an inline function with
// external linkage would let the linker keep the copy of the wrong one.
#define QT_FUNCTION QT_HOST_DEVICE static inline

namespace qt {

template <typename To, typename From>
QT_FUNCTION To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace qt
