// token_stats: nll, entropy, row_max and log_sum of every row in one read of the logits.
#include "interface.cuh"
#include "online_update.cuh"

namespace qt {

template <typename R>
struct Forward {
  Rows logits;
  Labels labels;
  unsigned size_c;
  int vocabulary;
  Factors<R> factors;
  R *nll, *entropy, *row_max, *log_sum;
  OnlineStats<R>* parts;  // [rows, blocks per row]; null: one block per row
};

template <Form FORM, typename T, typename R>
__device__ void write_row(const Forward<R>& in, unsigned row, int64_t label, OnlineStats<R> stats) {
  TokenStats<R> out = {R(0), R(0), R(0), R(0)};
  if (label != in.labels.ignore_index) {
    R bits = R(NAN);
    if (label >= 0 && label < in.vocabulary) {
      const T* logits = reinterpret_cast<const T*>(in.logits.at(row / in.size_c, row % in.size_c));
      bits = R(fma(scaled<FORM>(R(to_real(logits[label])), in.factors), in.factors.unit, -stats.row_max));
    }
    out = finalize<R>(stats, bits);
    // nothing to choose from: 0 without the rounding of log S, and a NaN still
    if (in.vocabulary == 1) out.nll *= R(0), out.entropy *= R(0);
  }
  in.nll[row] = out.nll;
  in.entropy[row] = out.entropy;
  in.row_max[row] = out.row_max;
  in.log_sum[row] = out.log_sum;
}

// Reads itemsize bytes per element once, and a label per row; writes 4 statistics, or one partial row per block.
// Identity (r, S, T) = (-1e30, 0, 0). Each thread adds 16-byte vectors to its own partial row, so the loop has no
// barrier and no shuffle; the block merges once, behind it.
template <typename T, Form FORM>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 || FORM == Form::SOFTCAP ? 2 : kResident)
    token_stats_kernel(const Forward<Real<T>> in) {
  using R = Real<T>;
  const unsigned row = blockIdx.x;
  const int64_t label = in.labels[row];
  if (label == in.labels.ignore_index) {
    if (!in.parts && threadIdx.x == 0) write_row<FORM, T>(in, row, label, empty_stats<R>());
    return;
  }
  const char* begin = in.logits.at(row / in.size_c, row % in.size_c);
  const Span<T> span(begin, in.vocabulary);
  OnlineStats<R> stats = empty_stats<R>();

  const char* from = begin + span.before * sizeof(T);
  unsigned offset = (unsigned(span.first) + threadIdx.x) * 16;
  const unsigned end = unsigned(span.last) * 16;
  const unsigned pairs_end = end > kTrip ? end - kTrip : 0;
  if constexpr (FORM != Form::SOFTCAP && sizeof(T) < 8) {
#pragma unroll 1
    for (; offset < pairs_end; offset += 2 * kTrip) {
      const uint4 vectors[2] = {vector_at(from, offset)[0], vector_at(from, offset)[kThreads]};
      online_update<FORM, 2, T>(stats, vectors, in.factors);
    }
  }
#pragma unroll 1
  for (; offset < end; offset += kTrip) {
    const uint4 vectors[1] = {*vector_at(from, offset)};
    online_update<FORM, 1, T>(stats, vectors, in.factors);
  }
  if (int(threadIdx.x) < span.edges) {
    const R x = to_real(reinterpret_cast<const T*>(begin)[span.edge()]);
    update_one(stats, scaled<FORM>(x, in.factors), in.factors.unit);
  }

  stats = merge_block(stats);
  if (threadIdx.x != 0) return;
  if (in.parts)
    in.parts[int64_t(row) * gridDim.y + blockIdx.y] = stats;
  else
    write_row<FORM, T>(in, row, label, stats);
}

// One warp per row: merges the partial rows of its blocks. Ignored rows have none.
template <typename T, Form FORM>
__global__ void __launch_bounds__(32) combine_kernel(const Forward<Real<T>> in, int blocks) {
  using R = Real<T>;
  const unsigned row = blockIdx.x;
  const int64_t label = in.labels[row];
  OnlineStats<R> stats = empty_stats<R>();
  if (label != in.labels.ignore_index && int(threadIdx.x) < blocks)
    stats = in.parts[int64_t(row) * blocks + threadIdx.x];
  stats = merge_warp(stats);
  if (threadIdx.x == 0) write_row<FORM, T>(in, row, label, stats);
}

template <typename T, Form FORM>
static int run(const qt_logits& logits, const qt_labels& labels, qt_scaling scaling, const qt_statistics& out,
               void* parts, int blocks, qt_target target) {
  using R = Real<T>;
  const Forward<R> in = {rows(logits),
                         view(labels),
                         unsigned(logits.size_c),
                         int(logits.vocabulary),
                         factors_of<R>(scaling),
                         static_cast<R*>(out.nll),
                         static_cast<R*>(out.entropy),
                         static_cast<R*>(out.row_max),
                         static_cast<R*>(out.log_sum),
                         blocks > 1 ? static_cast<OnlineStats<R>*>(parts) : nullptr};
  const unsigned count = unsigned(rows_of(logits));
  QT_RETURN_IF_FAILED(
      launch(token_stats_kernel<T, FORM>, dim3(count, unsigned(blocks)), kThreads, target, "token_stats", in));
  if (blocks == 1) return QT_OK;
  return launch(combine_kernel<T, FORM>, dim3(count), 32, target, "token_stats (combine)", in, blocks);
}

}  // namespace qt

int qt_cuda_token_stats_workspace(const qt_logits* logits, qt_target target, int64_t* bytes) {
  using namespace qt;
  QT_RETURN_IF_FAILED(check_logits(*logits, "logits"));
  int blocks = 1;
  QT_RETURN_IF_FAILED(blocks_per_row(*logits, target, &blocks));
  *bytes = blocks > 1 ? rows_of(*logits) * blocks * 3 * stats_bytes(logits->dtype) : 0;
  return QT_OK;
}

int qt_cuda_token_stats(const qt_logits* logits, const qt_labels* labels, qt_scaling scaling, const qt_statistics* out,
                        void* workspace, qt_target target) {
  using namespace qt;
  QT_RETURN_IF_FAILED(check_logits(*logits, "logits"));
  if (rows_of(*logits) == 0) return QT_OK;
  const OnDevice device(target.device);
  QT_RETURN_IF_FAILED(device.status());
  int blocks = 1;
  QT_RETURN_IF_FAILED(blocks_per_row(*logits, target, &blocks));
  return with_type(logits->dtype, [&](auto tag) {
    using T = decltype(tag);
    switch (form_of(scaling)) {
      case Form::LINEAR:
        return run<T, Form::LINEAR>(*logits, *labels, scaling, *out, workspace, blocks, target);
      case Form::NEGATED:
        return run<T, Form::NEGATED>(*logits, *labels, scaling, *out, workspace, blocks, target);
      default:
        return run<T, Form::SOFTCAP>(*logits, *labels, scaling, *out, workspace, blocks, target);
    }
  });
}
