// What every processor of the platform runs.
#define QT_ISA baseline
#define QT_LANES 4
#include "kernels.inc"
