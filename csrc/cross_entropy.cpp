// Softmax cross-entropy over rows of logits to second order on CPUs; the mathematics stands in
// mamlfast/ops/cross_entropy.py, in the same names.
//
// A row of logits is read once for its maximum and once for its exponentials, by then from the second-level cache.
// Nothing of the width of the vocabulary is written but z_bar and z_bar_dot. Ignored rows are never read.
#include "rows.h"
#include "simd.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

namespace mamlfast {
namespace {

// What is asked of the rows: q = (1 - smoothing) e + smoothing / V.
struct Labels {
  const int64_t* target;  // (R,)
  int64_t R, V, ignore_index;
  double smoothing;

  MAMLFAST_INLINE bool ignored(int64_t row) const { return target[row] == ignore_index; }

  // <q, z> for a row of logits or of their tangents.
  template <class T>
  MAMLFAST_INLINE double expected(const T* z, int64_t row) const {
    const double picked = z[target[row]];
    if (smoothing == 0) return picked;
    return (1 - smoothing) * picked + smoothing * sum_of(z, V) / static_cast<double>(V);
  }
};

template <class T>
struct Forward {
  const T *z, *z_dot;     // (R, V); the second may be null
  double *lse, *nll;      // (R,), zero in ignored rows
  double *mu, *nll_dot;   // as above; null without tangents
  Labels labels;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    const int64_t V = labels.V;
    for (int64_t row = begin; row < end; ++row) {
      lse[row] = nll[row] = 0;
      if (z_dot) mu[row] = nll_dot[row] = 0;
      if (labels.ignored(row)) continue;
      const T* zr = z + row * V;
      const T* zr_dot = z_dot ? z_dot + row * V : nullptr;
      const LogSumExp<T> r = log_sum_exp<Isa>(zr, zr_dot, V);
      lse[row] = r.max + r.log_sum;
      nll[row] = lse[row] - labels.expected(zr, row);
      if (!z_dot) continue;
      mu[row] = r.mu;
      nll_dot[row] = r.mu - labels.expected(zr_dot, row);
    }
  }
};

template <class T>
struct Backward {
  const T *z, *z_dot;           // (R, V); the second may be null
  const double *lse, *mu;       // (R,)
  const T *y_bar, *y_bar_dot;   // one, or R of them
  T *z_bar, *z_bar_dot;         // (R, V); each may be null
  int64_t cotangent_stride;     // from one row's y_bar to the next
  double weight;
  Labels labels;

  template <class Isa>
  MAMLFAST_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      if (!labels.ignored(row)) {
        visit<Isa>(row);
        continue;
      }
      if (z_bar) fill_zero(z_bar + row * labels.V, labels.V);
      if (z_bar_dot) fill_zero(z_bar_dot + row * labels.V, labels.V);
    }
  }

  template <class Isa>
  MAMLFAST_INLINE void visit(int64_t row) const {
    const int64_t V = labels.V, at = row * V, label = at + labels.target[row];
    // p = exp(z - lse), where lse is rounded to T and exp(what that took away) is a factor.
    const T shift = static_cast<T>(lse[row]), factor = static_cast<T>(std::exp(shift - lse[row]));
    const T uniform = static_cast<T>(labels.smoothing / static_cast<double>(V));
    const T sharp = static_cast<T>(1 - labels.smoothing);
    const T g = static_cast<T>(weight * y_bar[row * cotangent_stride]);
    const T g_dot = z_bar_dot ? static_cast<T>(weight * y_bar_dot[row * cotangent_stride]) : T(0);
    const T row_mu = z_bar_dot ? static_cast<T>(mu[row]) : T(0);
    for (int64_t first = at; first < at + V; first += kBlock) {
      const int64_t n = std::min(kBlock, at + V - first);
      T p[kBlock];
      exponentials<Isa>(z + first, shift, factor, n, p);
      if (z_bar) primal(p, uniform, g, n, z_bar + first);
      if (z_bar_dot) tangent(p, z_dot + first, uniform, row_mu, g, g_dot, n, z_bar_dot + first);
    }
    // The loops took every element for one without the label.
    const T p = factor * exp_flushed<Isa>(z[label] - shift), difference = (p - uniform) - sharp;
    if (z_bar) z_bar[label] = g * difference;
    if (z_bar_dot) z_bar_dot[label] = g_dot * difference + g * (p * (z_dot[label] - row_mu));
  }

  MAMLFAST_INLINE void primal(const T* p, T uniform, T g, int64_t n, T* out) const {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = g * (p[i] - uniform);
  }

  MAMLFAST_INLINE void tangent(const T* p, const T* dot, T uniform, T row_mu, T g, T g_dot, int64_t n, T* out) const {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = g_dot * (p[i] - uniform) + g * (p[i] * (dot[i] - row_mu));
  }
};

// Checks the shapes and every label: one outside the vocabulary would be an address outside the row.
Labels labels_of(const Tensor& z, const Tensor& target, int64_t ignore_index, double smoothing) {
  STD_TORCH_CHECK(z.dim() == 2, "cross_entropy: [R, V] logits expected");
  const int64_t R = z.size(0), V = z.size(1);
  check(target, ScalarType::Long, R, "target", "int64");
  const auto* labels = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t row = 0; row < R; ++row) {
    const bool known = labels[row] >= 0 && labels[row] < V;
    STD_TORCH_CHECK(known || labels[row] == ignore_index, "cross_entropy: the label ", labels[row], " of row ", row,
                    " is out of bounds; labels from 0 to ", V - 1, " or the ignore_index ", ignore_index, " expected");
  }
  return {labels, R, V, ignore_index, smoothing};
}

double weight_of(const Labels& labels, bool mean) {
  if (!mean) return 1;
  int64_t labelled = 0;
  for (int64_t row = 0; row < labels.R; ++row) labelled += !labels.ignored(row);
  return 1.0 / static_cast<double>(labelled);
}

// Where y is a scalar, the sum in the order of the rows, whatever the number of threads. Without labelled rows the
// mean is 0 / 0, NaN, as in torch.
template <class T>
void reduce(const std::vector<double>& losses, const Labels& labels, bool mean, const Tensor& y, T* out) {
  if (y.dim() > 0) {
    std::transform(losses.begin(), losses.end(), out, [](double loss) { return static_cast<T>(loss); });
    return;
  }
  double sum = 0;
  for (const double loss : losses) sum += loss;
  *out = static_cast<T>(sum * weight_of(labels, mean));
}

double* statistic(const Tensor& t, int64_t R, const char* name) {
  check(t, ScalarType::Double, R, name, "float64");
  return static_cast<double*>(t.mutable_data_ptr());
}

double* statistic(const MaybeTensor& t, int64_t R, const char* name) {
  return t.has_value() ? statistic(*t, R, name) : nullptr;
}

void cross_entropy_fwd(Tensor z, MaybeTensor z_dot, Tensor target, Tensor y, MaybeTensor y_dot, Tensor lse,
                       MaybeTensor mu, bool mean, int64_t ignore_index, double smoothing) {
  const Labels labels = labels_of(z, target, ignore_index, smoothing);
  const int64_t R = labels.R, V = labels.V, outputs = y.dim() > 0 ? R : 1;
  std::vector<double> nll(R), nll_dot(z_dot.has_value() ? R : 0);
  for_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> kernel{data<T>(z, z, R * V, "z"),  data<T>(z_dot, z, R * V, "z_dot"),
                            statistic(lse, R, "lse"),   nll.data(),
                            statistic(mu, R, "mu"),     nll_dot.data(),
                            labels};
    T* const loss = data<T>(y, z, outputs, "y");
    T* const loss_dot = data<T>(y_dot, z, outputs, "y_dot");
    STD_TORCH_CHECK(!kernel.z_dot == !kernel.mu && !kernel.z_dot == !loss_dot,
                    "cross_entropy_fwd: z_dot, mu and y_dot expected together");
    over(R, V, kernel);
    reduce(nll, labels, mean, y, loss);
    if (loss_dot) reduce(nll_dot, labels, mean, y, loss_dot);
  });
}

void cross_entropy_bwd(Tensor z, MaybeTensor z_dot, Tensor target, Tensor y_bar, MaybeTensor y_bar_dot, Tensor lse,
                       MaybeTensor mu, MaybeTensor z_bar, MaybeTensor z_bar_dot, bool mean, int64_t ignore_index,
                       double smoothing) {
  const Labels labels = labels_of(z, target, ignore_index, smoothing);
  const int64_t R = labels.R, V = labels.V, inputs = y_bar.dim() > 0 ? R : 1;
  for_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> kernel{data<T>(z, z, R * V, "z"),           data<T>(z_dot, z, R * V, "z_dot"),
                             statistic(lse, R, "lse"),            statistic(mu, R, "mu"),
                             data<T>(y_bar, z, inputs, "y_bar"),  data<T>(y_bar_dot, z, inputs, "y_bar_dot"),
                             data<T>(z_bar, z, R * V, "z_bar"),   data<T>(z_bar_dot, z, R * V, "z_bar_dot"),
                             y_bar.dim() > 0 ? 1 : 0,             weight_of(labels, mean),
                             labels};
    STD_TORCH_CHECK(!kernel.z_bar_dot || (kernel.z_dot && kernel.mu && kernel.y_bar_dot),
                    "cross_entropy_bwd: z_dot, mu and y_bar_dot expected with z_bar_dot");
    over(R, V, kernel);
  });
}

}  // namespace
}  // namespace mamlfast

STABLE_TORCH_LIBRARY_FRAGMENT(mamlfast, m) {
  m.def(
      "cross_entropy_fwd(Tensor z, Tensor? z_dot, Tensor target, Tensor(a!) y, Tensor(b!)? y_dot, Tensor(c!) lse, "
      "Tensor(d!)? mu, bool mean, int ignore_index, float smoothing) -> ()");
  m.def(
      "cross_entropy_bwd(Tensor z, Tensor? z_dot, Tensor target, Tensor y_bar, Tensor? y_bar_dot, Tensor lse, "
      "Tensor? mu, Tensor(a!)? z_bar, Tensor(b!)? z_bar_dot, bool mean, int ignore_index, float smoothing) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mamlfast, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&mamlfast::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&mamlfast::cross_entropy_bwd));
}
