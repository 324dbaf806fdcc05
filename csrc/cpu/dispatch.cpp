#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace qt {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

static const Kernels& choose() {
  const Kernels* usable[3];  // best first
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    usable[count++] = &kernels_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) usable[count++] = &kernels_avx2;
#endif
  usable[count++] = &kernels_baseline;
  const char* forced = getenv("QTUNING_CPU_ISA");
  if (!forced || !*forced) return *usable[0];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (strcmp(forced, usable[i]->isa) == 0) return *usable[i];
    names += (i ? ", " : "") + std::string(usable[i]->isa);
  }
  throw std::invalid_argument("QTUNING_CPU_ISA=" + std::string(forced) + " is not usable here; accepted: " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace qt
