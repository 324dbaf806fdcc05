// What every processor of the platform runs.
#define QT_ISA baseline
#include "kernels.inc"
