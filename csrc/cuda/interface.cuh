// What the entry points share: status and message, the limits of sizes, and launches.
#pragma once

#include <cuda_runtime.h>

#include "rows.cuh"

namespace qt {

// Records the message for qt_cuda_error_message and returns the status.
int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));
int cuda_status(cudaError_t error, const char* what);

#define QT_RETURN_IF_FAILED(expression)         \
  do {                                          \
    const int qt_status_ = (expression);        \
    if (qt_status_ != QT_OK) return qt_status_; \
  } while (0)

int check_logits(const qt_logits& logits, const char* name);
int item_bytes(int32_t dtype);
inline int stats_bytes(int32_t dtype) { return dtype == QT_FLOAT64 ? 8 : 4; }
inline int64_t rows_of(const qt_logits& logits) { return logits.size_a * logits.size_c; }

// Blocks per row, "fill one wave": as many as bring the grid to one full wave of resident blocks, while each still
// reads 32 KiB (four trips of its loop); at most 32, which one warp combines. 1 where there are rows enough.
int blocks_per_row(const qt_logits& logits, qt_target target, int* blocks);

Rows rows(const qt_logits& logits);
Labels view(const qt_labels& labels);

// Makes the target's device current, and the caller's again at the end.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  int status() const { return status_; }

 private:
  int before_ = -1;
  int status_ = QT_OK;
};

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, qt_target target, const char* name,
           Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.stream = static_cast<cudaStream_t>(target.stream);
  return cuda_status(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// Calls f with a value of the element type of `dtype`.
template <typename F>
int with_type(int32_t dtype, F f) {
  switch (dtype) {
    case QT_FLOAT32:
      return f(float{});
    case QT_FLOAT64:
      return f(double{});
    case QT_BFLOAT16:
      return f(bfloat16{});
    default:
      return f(float16{});
  }
}

}  // namespace qt
