// token_stats_backward: the gradient of nll, entropy and lse, in place or into another tensor.
#include "interface.cuh"
#include "scaling.cuh"

namespace qt {

template <typename R>
struct Backward {
  Rows logits, grad;
  Labels labels;
  unsigned size_c;
  int vocabulary;
  Factors<R> factors;
  const R *entropy, *row_max, *log_sum;
  const R *grad_nll, *grad_entropy, *grad_lse;  // null: 0
};

#ifdef __CUDA_ARCH__
QT_FUNCTION float rounded_product(float x, float y) { return __fmul_rn(x, y); }
QT_FUNCTION double rounded_product(double x, double y) { return __dmul_rn(x, y); }
#else
QT_FUNCTION float rounded_product(float x, float y) { return x * y; }
QT_FUNCTION double rounded_product(double x, double y) { return x * y; }
#endif

// The reference is lse in bits. A large common offset leaves it a rounding error, which is known.
template <typename R>
QT_FUNCTION GradientBits<R> gradient_bits_of(const RowGradient<R>& row, R slope) {
  const R high = rounded_product(row.row_max, Log2<R>::e), low = rounded_product(row.log_sum, Log2<R>::e);
  const R reference = high + low;
  const R part = reference - high;
  const R excess = -((high - (reference - part)) + (low - part) + R(fma(row.row_max, Log2<R>::e, -high)));
  return gradient_bits_of(reference, excess, row, slope);
}

template <Form FORM, bool HAS_ENTROPY, typename R>
QT_FUNCTION R gradient_of_x(R x, const Factors<R>& factors, const GradientBits<R>& row) {
  const R y = scaled<FORM>(x, factors);
  const R g = gradient_of_bits<HAS_ENTROPY>(R(fma(y, factors.unit, -row.reference)), row);
  return FORM == Form::SOFTCAP ? g * (R(1) - y * y) : g;
}

// `x` with its sign turned already if FORM asks for that; `bounded`: neither is -inf
template <Form FORM, bool HAS_ENTROPY>
QT_FUNCTION Pair gradient_pair(Pair x, const Factors<float>& factors, const GradientBits<float>& row, bool bounded) {
  if (FORM == Form::SOFTCAP)
    return {gradient_of_x<FORM, HAS_ENTROPY>(x.x, factors, row), gradient_of_x<FORM, HAS_ENTROPY>(x.y, factors, row)};
  Pair t = fma_pair(x, {factors.unit, factors.unit}, {-row.reference, -row.reference});
  const Pair p = {exp2_of(t.x), exp2_of(t.y)};
  if (!HAS_ENTROPY) return mul_pair(p, {row.a, row.a});
  if (!bounded) t = {fmaxf(t.x, no_bits<float>()), fmaxf(t.y, no_bits<float>())};
  return mul_pair(p, fma_pair(t, {row.b, row.b}, {row.a, row.a}));
}

template <typename T, Form FORM, bool HAS_ENTROPY>
QT_FUNCTION uint4 gradient(uint4 vector, const Factors<Real<T>>& factors, const GradientBits<Real<T>>& row) {
  uint32_t w[4];
  to_words(vector, w);
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < 2; ++i) {
      const double x = bit_cast<double>(uint64_t(w[2 * i + 1]) << 32 | w[2 * i]);
      const uint64_t g = bit_cast<uint64_t>(gradient_of_x<FORM, HAS_ENTROPY>(x, factors, row));
      w[2 * i] = uint32_t(g), w[2 * i + 1] = uint32_t(g >> 32);
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t sign = FORM == Form::NEGATED ? 0x80000000u : 0;
      const Pair x = {bit_cast<float>(w[2 * i] ^ sign), bit_cast<float>(w[2 * i + 1] ^ sign)};
      const Pair g = gradient_pair<FORM, HAS_ENTROPY>(x, factors, row, false);
      w[2 * i] = bit_cast<uint32_t>(g.x), w[2 * i + 1] = bit_cast<uint32_t>(g.y);
    }
  } else {
    // -inf as a number: half an instruction per element, against one behind the multiply-add
    constexpr bool BOUNDED = kIsBfloat16<T> && HAS_ENTROPY && FORM != Form::SOFTCAP;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t word = FORM == Form::NEGATED ? w[i] ^ 0x80008000u : w[i];
      if (BOUNDED) word = max_pair(word, factors.floor, bfloat16{});
      w[i] = pack(gradient_pair<FORM, HAS_ENTROPY>(unpack(word, T{}), factors, row, BOUNDED), T{});
    }
  }
  return {w[0], w[1], w[2], w[3]};
}

// An active row: reads and writes itemsize bytes per element once. A pruned one: writes its zeros, reads nothing.
// With p = e^((z-m) - log S): g_nll (p - 1[y]) - g_entropy p (log p + entropy) + g_lse p = p (a + b log2 p) - g_nll
// 1[y]. The thread that handles the label's element reads it before its loop and writes it again after it, from
// float32, so that no barrier is needed. SAME_LEAD: every row of logits and gradient begins at the same place within 16
// bytes; otherwise stores stay aligned, and each load takes the two vectors that it straddles.
template <typename T, Form FORM, bool HAS_ENTROPY, bool SAME_LEAD>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 || FORM == Form::SOFTCAP || !SAME_LEAD ? 2 : kResident)
    token_stats_backward_kernel(const Backward<Real<T>> in) {
  using R = Real<T>;
  constexpr bool PAIRS = FORM != Form::SOFTCAP;
  const unsigned row = blockIdx.x;
  const int64_t label = in.labels[row];
  const R grad_nll = in.grad_nll ? in.grad_nll[row] : R(0);
  const R grad_entropy = HAS_ENTROPY ? in.grad_entropy[row] : R(0);
  const R grad_lse = in.grad_lse ? in.grad_lse[row] : R(0);
  T* out = reinterpret_cast<T*>(in.grad.at(row / in.size_c, row % in.size_c));
  // where loads straddle vectors, the last one would reach behind the row
  const Span<T> span(reinterpret_cast<const char*>(out), in.vocabulary, SAME_LEAD ? 0 : 1);
  char* to = reinterpret_cast<char*>(out + span.before);
  unsigned offset = (unsigned(span.first) + threadIdx.x) * 16;
  const unsigned end = unsigned(span.last) * 16;
  const unsigned pairs_end = end > kTrip ? end - kTrip : 0;

  if (label == in.labels.ignore_index || (grad_nll == 0 && grad_entropy == 0 && grad_lse == 0)) {
#pragma unroll 1
    for (; offset < end; offset += kTrip) *vector_at(to, offset) = uint4{0, 0, 0, 0};
    if (int(threadIdx.x) < span.edges) store(out + span.edge(), R(0));
    return;
  }

  const bool in_range = label >= 0 && label < in.vocabulary;
  const R grad_p = in_range ? grad_nll + grad_lse : R(NAN);
  const RowGradient<R> upstream = {in.row_max[row], in.log_sum[row], in.entropy[row], grad_p, grad_entropy, grad_nll};
  const GradientBits<R> bits = gradient_bits_of(upstream, in.factors.slope);
  const T* logits = reinterpret_cast<const T*>(in.logits.at(row / in.size_c, row % in.size_c));
  const bool owns_label = in_range && span.owns(int(label));
  R x_label = R(0);
  if (owns_label) x_label = to_real(logits[label]);

  if constexpr (SAME_LEAD) {
    const char* from = reinterpret_cast<const char*>(logits + span.before);
    if constexpr (PAIRS) {
#pragma unroll 1
      for (; offset < pairs_end; offset += 2 * kTrip) {
        const uint4 first = vector_at(from, offset)[0], second = vector_at(from, offset)[kThreads];
        vector_at(to, offset)[0] = gradient<T, FORM, HAS_ENTROPY>(first, in.factors, bits);
        vector_at(to, offset)[kThreads] = gradient<T, FORM, HAS_ENTROPY>(second, in.factors, bits);
      }
    }
#pragma unroll 1
    for (; offset < end; offset += kTrip)
      *vector_at(to, offset) = gradient<T, FORM, HAS_ENTROPY>(*vector_at(from, offset), in.factors, bits);
  } else {
    const char* from = reinterpret_cast<const char*>(logits + span.before);
#pragma unroll 1
    for (; offset < end; offset += kTrip)
      *vector_at(to, offset) = gradient<T, FORM, HAS_ENTROPY>(load_unaligned(from + offset), in.factors, bits);
  }
  if (int(threadIdx.x) < span.edges) {
    const int i = span.edge();
    store(out + i, gradient_of_x<FORM, HAS_ENTROPY>(R(to_real(logits[i])), in.factors, bits));
  }
  if (owns_label) {
    const R y = scaled<FORM>(x_label, in.factors);
    const R slope = FORM == Form::SOFTCAP ? in.factors.slope * (R(1) - y * y) : in.factors.slope;
    const R subtracted = in.grad_nll ? in.grad_nll[row] * slope : R(0);  // read again: a register less in the loop
    store(out + label, gradient_of_x<FORM, HAS_ENTROPY>(x_label, in.factors, bits) - subtracted);
  }
}

// Whether each row of both begins at the same place within its 16 bytes.
static bool same_lead(const qt_logits& logits, const qt_logits& grad) {
  const int64_t bytes = item_bytes(logits.dtype);
  auto differ = [bytes](int64_t size, int64_t ours, int64_t theirs) {
    return size > 1 && (ours - theirs) * bytes % 16 != 0;
  };
  return (reinterpret_cast<uintptr_t>(logits.data) - reinterpret_cast<uintptr_t>(grad.data)) % 16 == 0 &&
         !differ(logits.size_a, logits.stride_a, grad.stride_a) &&
         !differ(logits.size_c, logits.stride_c, grad.stride_c);
}

template <typename T, Form FORM, bool HAS_ENTROPY>
static int run(const qt_logits& logits, const qt_logits& grad, const qt_labels& labels, const qt_upstream& upstream,
               qt_scaling scaling, int blocks, qt_target target) {
  using R = Real<T>;
  auto values = [](const void* pointer) { return static_cast<const R*>(pointer); };
  const Backward<R> in = {rows(logits),
                          rows(grad),
                          view(labels),
                          unsigned(logits.size_c),
                          int(logits.vocabulary),
                          factors_of<R>(scaling),
                          values(upstream.entropy),
                          values(upstream.row_max),
                          values(upstream.log_sum),
                          values(upstream.grad_nll),
                          values(upstream.grad_entropy),
                          values(upstream.grad_lse)};
  const dim3 grid(unsigned(rows_of(logits)), unsigned(blocks));
  if (same_lead(logits, grad))
    return launch(token_stats_backward_kernel<T, FORM, HAS_ENTROPY, true>, grid, kThreads, target,
                  "token_stats_backward", in);
  return launch(token_stats_backward_kernel<T, FORM, HAS_ENTROPY, false>, grid, kThreads, target,
                "token_stats_backward", in);
}

}  // namespace qt

int qt_cuda_token_stats_backward(const qt_logits* logits, const qt_logits* grad, const qt_labels* labels,
                                 const qt_upstream* upstream, qt_scaling scaling, qt_target target) {
  using namespace qt;
  QT_RETURN_IF_FAILED(check_logits(*logits, "logits"));
  QT_RETURN_IF_FAILED(check_logits(*grad, "grad"));
  if (rows_of(*logits) == 0) return QT_OK;
  const OnDevice device(target.device);
  QT_RETURN_IF_FAILED(device.status());
  int blocks = 1;
  QT_RETURN_IF_FAILED(blocks_per_row(*logits, target, &blocks));
  return with_type(logits->dtype, [&](auto tag) {
    using T = decltype(tag);
    auto call = [&](auto with_entropy, auto without) {
      return (upstream->grad_entropy ? with_entropy : without)(*logits, *grad, *labels, *upstream, scaling, blocks,
                                                               target);
    };
    switch (form_of(scaling)) {
      case Form::LINEAR:
        return call(run<T, Form::LINEAR, true>, run<T, Form::LINEAR, false>);
      case Form::NEGATED:
        return call(run<T, Form::NEGATED, true>, run<T, Form::NEGATED, false>);
      default:
        return call(run<T, Form::SOFTCAP, true>, run<T, Form::SOFTCAP, false>);
    }
  });
}
