// The row arithmetic of the fused linear + cross-entropy to second order on CPUs; the mathematics stands in
// mamlfast/ops/linear_cross_entropy.py, in the same names.
//
// A chunk of logits is the caller's scratch: it arrives as a matrix product left it and leaves as the factor of the
// next ones. Whatever is asked of a row is done while the row is in the second-level cache: the soft-cap, the row
// statistics, and the cotangents, which take the place of the logits.
#include "activations.h"
#include "rows.h"
#include "simd.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace mamlfast {
namespace {

template <class T>
struct Rows {
  T *z, *z_dot;               // (R, V), overwritten; the second may be null
  const int64_t* target;      // (R,)
  double *lse, *mu;           // (R,); written if losses are, else read
  double *loss, *loss_dot;    // (R,); null where the statistics are known
  const double *g, *g_dot;    // (R,); null where no cotangents are wanted
  int64_t V;
  double smoothing, z_loss, softcap;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      if (softcap != 0) cap<Isa>(row);
      if (loss) statistics<Isa>(row);
      if (!g) continue;
      if (softcap != 0) {
        cotangents<Isa, true>(row);
      } else {
        cotangents<Isa, false>(row);
      }
    }
  }

  // s = cap tanh(z / cap), s_dot = (1 - tanh^2) z_dot.
  template <class Isa>
  MAMLFAST_INLINE void cap(int64_t row) const {
    const T height = static_cast<T>(softcap), inverse = static_cast<T>(1 / softcap);
    T* const s = z + row * V;
    if (!z_dot) {
#pragma omp simd
      for (int64_t i = 0; i < V; ++i) s[i] = height * Tanh::at<Isa>(s[i] * inverse).value;
      return;
    }
    T* const s_dot = z_dot + row * V;
#pragma omp simd
    for (int64_t i = 0; i < V; ++i) {
      const Slopes<T> tanh = Tanh::at<Isa>(s[i] * inverse);
      s[i] = height * tanh.value;
      s_dot[i] = tanh.first * s_dot[i];
    }
  }

  template <class Isa>
  MAMLFAST_INLINE void statistics(int64_t row) const {
    const T* const s = z + row * V;
    const T* const s_dot = z_dot ? z_dot + row * V : nullptr;
    const LogSumExp<T> r = log_sum_exp<Isa>(s, s_dot, V);
    lse[row] = r.max + r.log_sum;
    loss[row] = lse[row] - expected(s, row) + z_loss * lse[row] * lse[row];
    if (!z_dot) return;
    mu[row] = r.mu;
    loss_dot[row] = r.mu - expected(s_dot, row) + 2 * z_loss * lse[row] * r.mu;
  }

  // <q, s>
  MAMLFAST_INLINE double expected(const T* s, int64_t row) const {
    const double picked = s[target[row]];
    if (smoothing == 0) return picked;
    return (1 - smoothing) * picked + smoothing * sum_of(s, V) / static_cast<double>(V);
  }

  // The numbers that all columns of a row share.
  struct Row {
    T g, g_dot, a, a_dot, mu, inverse_square, curvature;
  };

  // z_bar and z_bar_dot of one column that has the probability p and the target q.
  template <bool capped>
  static MAMLFAST_INLINE void column(const Row& r, T p, T q, T& s, T* s_dot) {
    const T difference = r.a * p - q, s_bar = r.g * difference;
    const T u = capped ? T(1) - s * s * r.inverse_square : T(1);
    if (s_dot) {
      const T s_bar_dot = r.g_dot * difference + r.g * (p * (r.a * (*s_dot - r.mu) + r.a_dot));
      *s_dot = capped ? u * s_bar_dot - r.curvature * (s * *s_dot) * s_bar : s_bar_dot;
    }
    s = capped ? u * s_bar : s_bar;
  }

  template <class Isa, bool capped>
  MAMLFAST_INLINE void cotangents(int64_t row) const {
    // p = exp(s - lse), where lse is rounded to T and exp(what that took away) is a factor.
    const T shift = static_cast<T>(lse[row]), factor = static_cast<T>(std::exp(shift - lse[row]));
    const double square = softcap * softcap;
    const Row r{static_cast<T>(g[row]),
                z_dot ? static_cast<T>(g_dot[row]) : T(0),
                static_cast<T>(1 + 2 * z_loss * lse[row]),
                z_dot ? static_cast<T>(2 * z_loss * mu[row]) : T(0),
                z_dot ? static_cast<T>(mu[row]) : T(0),
                capped ? static_cast<T>(1 / square) : T(0),
                capped ? static_cast<T>(2 / square) : T(0)};
    const T uniform = static_cast<T>(smoothing / static_cast<double>(V));
    T* const s = z + row * V;
    T* const s_dot = z_dot ? z_dot + row * V : nullptr;
    const int64_t label = target[row];
    T labelled = s[label], labelled_dot = z_dot ? s_dot[label] : T(0);
    for (int64_t first = 0; first < V; first += kBlock) {
      const int64_t last = std::min(first + kBlock, V);
      if (z_dot) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i)
          column<capped>(r, factor * exp_flushed<Isa>(s[i] - shift), uniform, s[i], s_dot + i);
      } else {
#pragma omp simd
        for (int64_t i = first; i < last; ++i)
          column<capped>(r, factor * exp_flushed<Isa>(s[i] - shift), uniform, s[i], nullptr);
      }
    }
    // The loops took every column for one without the label.
    const T q = uniform + static_cast<T>(1 - smoothing), p = factor * exp_flushed<Isa>(labelled - shift);
    column<capped>(r, p, q, labelled, z_dot ? &labelled_dot : nullptr);
    s[label] = labelled;
    if (z_dot) s_dot[label] = labelled_dot;
  }
};

double* statistic(const MaybeTensor& t, int64_t R, const char* name) {
  if (!t.has_value()) return nullptr;
  check(*t, ScalarType::Double, R, name, "float64");
  return static_cast<double*>(t->mutable_data_ptr());
}

// A label outside the vocabulary would be an address outside the row.
const int64_t* labels_of(const Tensor& target, int64_t R, int64_t V) {
  check(target, ScalarType::Long, R, "target", "int64");
  const auto* labels = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t row = 0; row < R; ++row) {
    STD_TORCH_CHECK(labels[row] >= 0 && labels[row] < V, "linear_cross_entropy: the label ", labels[row],
                    " is out of bounds; labels from 0 to ", V - 1, " or the ignore_index expected");
  }
  return labels;
}

void linear_cross_entropy_rows(Tensor z, MaybeTensor z_dot, Tensor target, Tensor lse, MaybeTensor mu,
                               MaybeTensor loss, MaybeTensor loss_dot, MaybeTensor g, MaybeTensor g_dot,
                               double smoothing, double z_loss, double softcap) {
  STD_TORCH_CHECK(z.dim() == 2, "linear_cross_entropy: [R, V] logits expected");
  const int64_t R = z.size(0), V = z.size(1);
  for_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> kernel{data<T>(z, z, R * V, "z"),
                         data<T>(z_dot, z, R * V, "z_dot"),
                         labels_of(target, R, V),
                         statistic(lse, R, "lse"),
                         statistic(mu, R, "mu"),
                         statistic(loss, R, "loss"),
                         statistic(loss_dot, R, "loss_dot"),
                         statistic(g, R, "g"),
                         statistic(g_dot, R, "g_dot"),
                         V,
                         smoothing,
                         z_loss,
                         softcap};
    const bool dual = kernel.z_dot != nullptr;
    STD_TORCH_CHECK(!dual || (kernel.mu && !kernel.loss == !kernel.loss_dot && !kernel.g == !kernel.g_dot),
                    "linear_cross_entropy_rows: mu, and loss_dot and g_dot where loss and g are, expected with z_dot");
    over(R, V, kernel);
  });
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  m.def(
      "linear_cross_entropy_rows(Tensor(a!) z, Tensor(b!)? z_dot, Tensor target, Tensor(c!) lse, Tensor(d!)? mu, "
      "Tensor(e!)? loss, Tensor(f!)? loss_dot, Tensor? g, Tensor? g_dot, float smoothing, float z_loss, "
      "float softcap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) {
  m.impl("linear_cross_entropy_rows", TORCH_BOX(&mamlfast::linear_cross_entropy_rows));
}
