// The body of gemm.h for one instruction set; included once for each, inside a namespace that has said what a
// vector is: `Float` and `Double`, each with its scalar T, kWidth lanes, kRows x kVectors accumulators that fit the
// registers, and load, store, all (one value in every lane) and madd. No include guard, on purpose.

// A strip of MR rows and NV vectors of c, held in registers while the sum runs over k; kByRows: so lies a.
template <class V, bool kByRows, int MR, int NV>
MAMLFAST_INLINE void strip(const Product<typename V::T>& p, int64_t m, int64_t n) {
  using T = typename V::T;
  typename V::Vector sum[MR][NV];
  T* const c = p.c + m * p.c_stride + n;
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) sum[i][j] = p.add ? V::load(c + i * p.c_stride + j * V::kWidth) : V::all(T(0));
  const int64_t row = kByRows ? p.a_stride : 1, step = kByRows ? 1 : p.a_stride;
  for (int pair = 0; pair < 2; ++pair) {
    const T* a = p.a[pair];
    const T* b = p.b[pair];
    if (!a) break;
    a += m * row;
    b += n;
    for (int64_t k = 0; k < p.K; ++k, a += step, b += p.b_stride[pair]) {
      typename V::Vector bk[NV];
      for (int j = 0; j < NV; ++j) bk[j] = V::load(b + j * V::kWidth);
      for (int i = 0; i < MR; ++i) {
        const typename V::Vector aik = V::all(a[i * row]);
        for (int j = 0; j < NV; ++j) sum[i][j] = V::madd(aik, bk[j], sum[i][j]);
      }
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) V::store(c + i * p.c_stride + j * V::kWidth, sum[i][j]);
}

// All rows of NV vectors: strips of kRows, then of 4, 2 and 1.
template <class V, bool kByRows, int NV>
MAMLFAST_INLINE void column(const Product<typename V::T>& p, int64_t n) {
  int64_t m = 0;
  for (; m + V::kRows <= p.M; m += V::kRows) strip<V, kByRows, V::kRows, NV>(p, m, n);
  for (; m + 4 <= p.M; m += 4) strip<V, kByRows, 4, NV>(p, m, n);
  if (m + 2 <= p.M) strip<V, kByRows, 2, NV>(p, m, n), m += 2;
  if (m < p.M) strip<V, kByRows, 1, NV>(p, m, n);
}

template <class V, bool kByRows>
void multiply(const Product<typename V::T>& p) {
  int64_t n = 0;
  for (; n + V::kVectors * V::kWidth <= p.N; n += V::kVectors * V::kWidth) column<V, kByRows, V::kVectors>(p, n);
  if constexpr (V::kVectors > 2)
    for (; n + 2 * V::kWidth <= p.N; n += 2 * V::kWidth) column<V, kByRows, 2>(p, n);
  for (; n < p.N; n += V::kWidth) column<V, kByRows, 1>(p, n);
}

inline Gemm<float> of(float) { return {multiply<Float, true>, multiply<Float, false>}; }
inline Gemm<double> of(double) { return {multiply<Double, true>, multiply<Double, false>}; }
