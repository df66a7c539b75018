// Both matrix products by the bfloat16 dot product (vdpbf16ps: 32 multiply-adds an instruction, float32 sums), for
// bfloat16 queries over a bfloat16 cache. The cache is read as it lies, nothing is packed: scores take their pairs
// along the row, sums interleave the rows of two tokens in registers.
#include "cpu/float_ops.h"

namespace mla {
namespace {

MLA_INLINE __m512bh load_pairs(const void* from) { return (__m512bh)_mm512_loadu_si512(from); }
MLA_INLINE __m512bh load_half(const void* from) {  // 16 values, the others 0
  return (__m512bh)_mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

struct DotOps {
  using Q = uint16_t;
  static constexpr int kCacheDtype = MLA_DTYPE_BFLOAT16;

  // Sums are kept as interleaving two tokens leaves them: of 32 columns first those with bit 2 clear, then the others,
  // 4 at a time. read_columns undoes it.
  static int acc_stride(int rank) { return (rank + 31) / 32 * 32; }

  static vf read_columns(const float* row, int column) {
    const float* block = row + column / 32 * 32 + (column % 32 != 0 ? 8 : 0);
    const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(block));
    const __m512 high = _mm512_castps256_ps512(_mm256_loadu_ps(block + 16));
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    return (vf)_mm512_permutex2var_ps(low, order, high);
  }

  static void store_weights(float* scores, int t, vf weights) {
    store_as(reinterpret_cast<uint16_t*>(scores) + t, _mm512_cvtneps_pbh((__m512)weights));
  }

  static void load_query(uint16_t* to, const unsigned char* from, int, int width) { memcpy(to, from, width * 2); }

  template <int R, bool FETCH>
  static MLA_INLINE void score_block(const uint16_t* q, const Token* tokens, int width, float* scores, Fetch& fetch) {
    __m512 acc[R][4];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_setzero_ps();
    const Token t0 = tokens[0], t1 = tokens[1], t2 = tokens[2], t3 = tokens[3];
    auto step = [&](int d, auto load) __attribute__((always_inline)) {
      const __m512bh k[4] = {load(t0 + d * 2), load(t1 + d * 2), load(t2 + d * 2), load(t3 + d * 2)};
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const __m512bh x = load(q + (size_t)i * width + d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, k[j]);
      }
    };
    int d = 0;
    for (; d + 32 <= width; d += 32) {
      if (FETCH) fetch.lines(2);
      step(d, [](const void* from) { return load_pairs(from); });
    }
    if (d < width) step(d, [](const void* from) { return load_half(from); });
    vf sums[R][4];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[i][j] = (vf)acc[i][j];
    store_sums(sums, scores, kTile);
  }

  template <int R>
  static MLA_INLINE void score_rows(const uint16_t* q, int row, const Token* tokens, int begin, int end, int width,
                                    float* scores, Fetch& fetch) {
    q += (size_t)row * width;
    scores += (size_t)row * kTile;
    for (int t = begin; t < end; t += 4)
      if (row == 0)
        score_block<R, true>(q, tokens + t, width, scores + t, fetch);
      else
        score_block<R, false>(q, tokens + t, width, scores + t, fetch);
  }

  static void scores(const uint16_t* q, int rows, const Token* tokens, int count, int width, float* scores,
                     Fetch& fetch) {
    for (int block = 0; block < count; block += 16) {
      const int stop = block + 16 < count ? block + 16 : count;
      int r = 0;
      for (; r + 4 <= rows; r += 4) score_rows<4>(q, r, tokens, block, stop, width, scores, fetch);
      if (rows - r == 3) score_rows<3>(q, r, tokens, block, stop, width, scores, fetch);
      if (rows - r == 2) score_rows<2>(q, r, tokens, block, stop, width, scores, fetch);
      if (rows - r == 1) score_rows<1>(q, r, tokens, block, stop, width, scores, fetch);
    }
  }

  // Rows i < R, columns [column, column + 32 * B) or, with HALF, 16 columns.
  template <int R, int B, bool HALF, bool FETCH>
  static MLA_INLINE void sum_block(const float* weights, const Token* tokens, int count, int column, const float* alpha,
                                   float* sum, int stride, Fetch& fetch) {
    __m512 acc[R][2 * B];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 2 * B; ++j)
        acc[i][j] = _mm512_mul_ps(_mm512_loadu_ps(sum + (size_t)i * stride + j * 16), _mm512_set1_ps(alpha[i]));
    for (int t = 0; t < count; t += 2) {
      if (FETCH) fetch.lines(2);
      const Token even = tokens[t] + column * 2, odd = tokens[t + 1] + column * 2;
      __m512bh c[2 * B];
#pragma GCC unroll 2
      for (int j = 0; j < B; ++j) {
        const __m512i x = (__m512i)(HALF ? load_half(even) : load_pairs(even + j * 64));
        const __m512i y = (__m512i)(HALF ? load_half(odd) : load_pairs(odd + j * 64));
        c[2 * j] = (__m512bh)_mm512_unpacklo_epi16(x, y);
        c[2 * j + 1] = (__m512bh)_mm512_unpackhi_epi16(x, y);
      }
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        int32_t pair;
        memcpy(&pair, reinterpret_cast<const uint16_t*>(weights + i * kTile) + t, 4);
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < 2 * B; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], weight, c[j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 2 * B; ++j) _mm512_storeu_ps(sum + (size_t)i * stride + j * 16, acc[i][j]);
  }

  template <int R, int B, bool HALF>
  static MLA_INLINE void sum_rows(const float* weights, int row, const Token* tokens, int count, int column,
                                  const float* alpha, float* sum, int stride, Fetch& fetch) {
    weights += (size_t)row * kTile;
    sum += (size_t)row * stride + column;
    if (row == 0)
      sum_block<R, B, HALF, true>(weights, tokens, count, column, alpha + row, sum, stride, fetch);
    else
      sum_block<R, B, HALF, false>(weights, tokens, count, column, alpha + row, sum, stride, fetch);
  }

  template <int B, bool HALF>
  static void sum_columns(const float* weights, int rows, const Token* tokens, int count, int column,
                          const float* alpha, float* sum, int stride, Fetch& fetch) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) sum_rows<4, B, HALF>(weights, r, tokens, count, column, alpha, sum, stride, fetch);
    if (rows - r == 3) sum_rows<3, B, HALF>(weights, r, tokens, count, column, alpha, sum, stride, fetch);
    if (rows - r == 2) sum_rows<2, B, HALF>(weights, r, tokens, count, column, alpha, sum, stride, fetch);
    if (rows - r == 1) sum_rows<1, B, HALF>(weights, r, tokens, count, column, alpha, sum, stride, fetch);
  }

  // An odd count is rounded up: the weight after the last is 0 and the token list is padded.
  static void accumulate(const float* weights, int rows, const Token* tokens, int count, int rank, const float* alpha,
                         float* sum, int stride, Fetch& fetch) {
    int column = 0;
    for (; column + 64 <= rank; column += 64)
      sum_columns<2, false>(weights, rows, tokens, count, column, alpha, sum, stride, fetch);
    for (; column + 32 <= rank; column += 32)
      sum_columns<1, false>(weights, rows, tokens, count, column, alpha, sum, stride, fetch);
    if (column < rank) sum_columns<1, true>(weights, rows, tokens, count, column, alpha, sum, stride, fetch);
  }
};

}  // namespace

const Kernel& avx512bf16_kernel() {
  static const Kernel kernel = {"avx512bf16", 90, scratch_bytes<DotOps>, DotOps::acc_stride, run_segment<DotOps>,
                                store_row<DotOps>};
  return kernel;
}

}  // namespace mla
