// Both matrix products in float32 arithmetic, for any cache dtype and instruction set.
#ifndef MLA_CPU_FLOAT_OPS_H_
#define MLA_CPU_FLOAT_OPS_H_

#include "cpu/online.h"

namespace mla {
namespace {

// Register tiles: AVX-512 has 32 vector registers, the others 16.
constexpr int kScoreTokens = W == 16 ? 4 : 2;
constexpr int kSumVectors = W == 16 ? 4 : 2;
constexpr int kRows = 4;
constexpr int kFetchLines = 64;  // requested at once; more would wait for a free miss buffer

// out[i * stride + j] = sum of the lanes of acc[i * 4 + j]
template <int R, int T>
MLA_INLINE void store_sums(const vf (&acc)[R][T], float* out, int stride) {
#if defined(__AVX512F__)
  if constexpr (R * T == 16) {
    // Transposed reduction: 16 vectors to one, 4 lanes a row.
    __m512 a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = (__m512)acc[i / T][i % T];
    __m512 b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]));
      const __m512 y =
          _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
      b[i] = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
    }
    // b[i] holds 4 partial sums of row i in each 128-bit lane.
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x44), _mm512_shuffle_f32x4(b[0], b[1], 0xee));
    const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x44), _mm512_shuffle_f32x4(b[2], b[3], 0xee));
    const __m512 e = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
    _mm_storeu_ps(out, _mm512_extractf32x4_ps(e, 0));
    _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(e, 1));
    _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(e, 2));
    _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(e, 3));
    return;
  }
#endif
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < T; ++j) out[i * stride + j] = sum_lanes(acc[i][j]);
}

template <int D>
struct FloatOps {
  using Q = float;
  static constexpr int kCacheDtype = D;

  static int acc_stride(int rank) { return rank; }

  static vf read_columns(const float* row, int column) { return load_as<vf>(row + column); }

  static void store_weights(float* scores, int t, vf weights) { store_as(scores + t, weights); }

  static void load_query(float* to, const unsigned char* from, int dtype, int width) {
    for (int i = 0; i < width; i += W)
      store_as(to + i, dtype == MLA_DTYPE_FLOAT32    ? load<MLA_DTYPE_FLOAT32>(from + i * 4)
                       : dtype == MLA_DTYPE_BFLOAT16 ? load<MLA_DTYPE_BFLOAT16>(from + i * 2)
                                                     : load<MLA_DTYPE_FLOAT16>(from + i * 2));
  }

  template <int R>
  static MLA_INLINE void score_block(const float* q, const Token* tokens, int width, float* scores) {
    vf acc[R][kScoreTokens] = {};
    for (int d = 0; d < width; d += W) {
      vf k[kScoreTokens];
#pragma GCC unroll 4
      for (int j = 0; j < kScoreTokens; ++j) k[j] = load<D>(tokens[j] + d * dtype_bytes(D));
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const vf x = load_as<vf>(q + (size_t)i * width + d);
#pragma GCC unroll 4
        for (int j = 0; j < kScoreTokens; ++j) acc[i][j] += x * k[j];
      }
    }
    store_sums(acc, scores, kTile);
  }

  static void scores(const float* q, int rows, const Token* tokens, int count, int width, float* scores,
                     Fetch& fetch) {
    for (int block = 0; block < count; block += 16) {
      const int stop = block + 16 < count ? block + 16 : count;
      int r = 0;
      for (; r + kRows <= rows; r += kRows)
        for (int t = block; t < stop; t += kScoreTokens) {
          if (r == 0) fetch.lines(kFetchLines);
          score_block<kRows>(q + (size_t)r * width, tokens + t, width, scores + (size_t)r * kTile + t);
        }
      for (; r < rows; ++r)
        for (int t = block; t < stop; t += kScoreTokens)
          score_block<1>(q + (size_t)r * width, tokens + t, width, scores + (size_t)r * kTile + t);
    }
  }

  template <int R, int V>
  static MLA_INLINE void sum_block(const float* weights, const Token* tokens, int count, int column, const float* alpha,
                                   float* sum, int stride) {
    vf acc[R][V];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[i][j] = load_as<vf>(sum + (size_t)i * stride + j * W) * alpha[i];
    for (int t = 0; t < count; ++t) {
      vf c[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) c[j] = load<D>(tokens[t] + (column + j * W) * dtype_bytes(D));
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const float weight = weights[i * kTile + t];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) acc[i][j] += weight * c[j];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) store_as(sum + (size_t)i * stride + j * W, acc[i][j]);
  }

  template <int V>
  static MLA_INLINE void sum_columns(const float* weights, int rows, const Token* tokens, int count, int column,
                                     const float* alpha, float* sum, int stride) {
    int r = 0;
    for (; r + kRows <= rows; r += kRows)
      sum_block<kRows, V>(weights + (size_t)r * kTile, tokens, count, column, alpha + r,
                          sum + (size_t)r * stride + column, stride);
    for (; r < rows; ++r)
      sum_block<1, V>(weights + (size_t)r * kTile, tokens, count, column, alpha + r,
                      sum + (size_t)r * stride + column, stride);
  }

  static void accumulate(const float* weights, int rows, const Token* tokens, int count, int rank,
                         const float* alpha, float* sum, int stride, Fetch& fetch) {
    for (int column = 0; column < rank; column += kSumVectors * W) {
      fetch.lines(kFetchLines);
      if (column + kSumVectors * W <= rank) {
        sum_columns<kSumVectors>(weights, rows, tokens, count, column, alpha, sum, stride);
      } else {
        for (int rest = column; rest < rank; rest += W)
          sum_columns<1>(weights, rows, tokens, count, rest, alpha, sum, stride);
      }
    }
  }
};

void run_any(const Segment& s, const State& state, unsigned char* scratch) {
  if (s.kv_dtype == MLA_DTYPE_FLOAT32 || s.kv_dtype == MLA_DTYPE_FP8_DS_MLA)
    run_segment<FloatOps<MLA_DTYPE_FLOAT32>>(s, state, scratch);
  else if (s.kv_dtype == MLA_DTYPE_BFLOAT16)
    run_segment<FloatOps<MLA_DTYPE_BFLOAT16>>(s, state, scratch);
  else
    run_segment<FloatOps<MLA_DTYPE_FLOAT16>>(s, state, scratch);
}

constexpr Kernel make_float_kernel(const char* name, int macs_per_ns) {
  typedef FloatOps<MLA_DTYPE_FLOAT32> Ops;  // scratch and store are the same for every other
  return {name, macs_per_ns, scratch_bytes<Ops>, Ops::acc_stride, run_any, store_row<Ops>};
}

}  // namespace
}  // namespace mla

#endif  // MLA_CPU_FLOAT_OPS_H_
