// Zeros for rows that will not be read soon.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace qt {

// From this many bytes on, zeros go around the caches: a cache would read each line before it is overwritten, and
// would not hold them all until they are used.
constexpr int64_t kStreamFrom = int64_t(16) << 20;

inline void zero(char* out, int64_t bytes, bool streaming) {
#if defined(__SSE2__)
  if (streaming && bytes >= 64) {
    const int64_t before = -reinterpret_cast<intptr_t>(out) & 63;
    memset(out, 0, before);
    const __m128i zeros = _mm_setzero_si128();
    int64_t i = before;
    for (; i + 64 <= bytes; i += 64)
      for (int part = 0; part < 64; part += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(out + i + part), zeros);
    _mm_sfence();
    out += i, bytes -= i;
  }
#else
  (void)streaming;
#endif
  memset(out, 0, bytes);
}

}  // namespace qt
