/* The CUDA kernels behind a plain C interface: no torch, no C++ in the signatures.
 *
 * Every function enqueues work on the stream and returns without waiting, QT_OK or an error code; what went wrong is
 * then qt_cuda_error_message(). The caller (../cuda_binding.cpp) has checked the arguments; the sizes that kernels can
 * index and the logits' alignment are checked here. Pointers are device pointers unless stated otherwise. Shapes and
 * meaning are those of qtuning_kernels/kernels/contract.py.
 */
#ifndef QTUNING_CUDA_H
#define QTUNING_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum qt_status {
  QT_OK = 0,
  QT_BAD_ARGUMENT = 1,
  QT_CUDA_ERROR = 2 /* CUDA itself refused: no driver, no device, no memory, a failed launch */
};

enum qt_dtype { QT_FLOAT32 = 0, QT_FLOAT64 = 1, QT_BFLOAT16 = 2, QT_FLOAT16 = 3 };

/* [A, C, V] with a dense last dimension; strides in elements. */
typedef struct qt_logits {
  void* data;
  int32_t dtype; /* qt_dtype */
  int64_t size_a, size_c, vocabulary;
  int64_t stride_a, stride_c;
} qt_logits;

/* [A, C], contiguous. */
typedef struct qt_labels {
  const void* data;
  int32_t bytes; /* per label: 4 or 8 */
  int64_t ignore_index;
} qt_labels;

/* z = softcap·tanh(logit_scale·x / softcap); softcap 0: z = logit_scale·x */
typedef struct qt_scaling {
  double logit_scale, softcap;
} qt_scaling;

typedef struct qt_target {
  int32_t device;
  void* stream; /* cudaStream_t; NULL is the default stream */
} qt_target;

/* [A, C] each, contiguous: float64 for float64 logits, else float32. */
typedef struct qt_statistics {
  void *nll, *entropy, *row_max, *log_sum;
} qt_statistics;

/* [A, C] each, contiguous, of the statistics' dtype; a gradient that is NULL counts as 0. */
typedef struct qt_upstream {
  const void *entropy, *row_max, *log_sum;
  const void *grad_nll, *grad_entropy, *grad_lse;
} qt_upstream;

/* The text for the calling thread's last call that did not return QT_OK; never NULL. */
const char* qt_cuda_error_message(void);

/* Bytes of workspace that qt_cuda_token_stats needs (0 if each row is one block's), written to *bytes (host). */
int qt_cuda_token_stats_workspace(const qt_logits* logits, qt_target target, int64_t* bytes);

int qt_cuda_token_stats(const qt_logits* logits, const qt_labels* labels, qt_scaling scaling, const qt_statistics* out,
                        void* workspace, qt_target target);

/* Writes the gradient to `grad`, which may be the logits themselves. */
int qt_cuda_token_stats_backward(const qt_logits* logits, const qt_logits* grad, const qt_labels* labels,
                                 const qt_upstream* upstream, qt_scaling scaling, qt_target target);

#ifdef __cplusplus
}
#endif
#endif
