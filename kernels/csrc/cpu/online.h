// What all instruction-set kernels share: the walk over a segment's tiles, the online softmax, and the final store.
// `Ops` supplies the two matrix products:
//   Q            element of the converted queries in scratch
//   P            element of the weights, stored in place of the scores (float or bfloat16 bits)
//   scores       S[r][t] = dot(q[r], token[t])            t < count, count a multiple of 4
//   accumulate   acc[r][:] = acc[r][:] * alpha[r] + sum_t P[r][t] * token[t][:rank]
//   read_columns W consecutive columns of a row of acc, whose order is the kernel's own
//   kCacheDtype  enum mla_dtype of the tokens it multiplies; an fp8_ds_mla cache is unpacked to it tile by tile
#ifndef MLA_CPU_ONLINE_H_
#define MLA_CPU_ONLINE_H_

#include "cpu/segment.h"
#include "cpu/vec.h"

namespace mla {
namespace {

typedef const unsigned char* Token;

// The cache lines of the next tile, to be requested a few at a time between multiplications: memory then works while
// the current tile is multiplied out of the caches.
struct Fetch {
  const Token* tokens;
  int count, token_bytes;
  int token, byte;

  MLA_INLINE void lines(int n) {
    for (int i = 0; i < n && token < count; ++i) {
      __builtin_prefetch(tokens[token] + byte, 0, 2);
      byte += 64;
      if (byte >= token_bytes) byte = 0, ++token;
    }
  }
};

MLA_INLINE size_t align64(size_t n) { return (n + 63) / 64 * 64; }

struct Scratch {
  unsigned char* q;
  float* scores;  // [rows, kTile]
  float* alpha;   // [rows]
  Token *tokens, *next;
  Token* multiplied;  // the tokens as the products read them: `tokens`, or where they were unpacked
  unsigned char* unpacked;
};

template <class Ops>
size_t scratch_bytes(int rows, int width, int kv_dtype) {
  const size_t unpacked =
      kv_dtype == MLA_DTYPE_FP8_DS_MLA ? kTile * (size_t)width * dtype_bytes(Ops::kCacheDtype) : 0;
  return align64((size_t)rows * width * sizeof(typename Ops::Q)) + (size_t)rows * kTile * 4 + align64(rows * 4) +
         3 * kTile * sizeof(Token) + unpacked + 64;
}

template <class Ops>
MLA_INLINE Scratch scratch_at(unsigned char* base, int rows, int width) {
  Scratch s;
  s.q = base;
  base += align64((size_t)rows * width * sizeof(typename Ops::Q));
  s.scores = reinterpret_cast<float*>(base);
  base += (size_t)rows * kTile * 4;
  s.alpha = reinterpret_cast<float*>(base);
  base += align64(rows * 4);
  s.tokens = reinterpret_cast<Token*>(base);
  s.next = s.tokens + kTile;
  s.multiplied = s.next + kTile;
  s.unpacked = reinterpret_cast<unsigned char*>(s.multiplied + kTile);
  return s;
}

// Addresses of tokens [begin, end); the list is padded to a multiple of 4 with the last one.
MLA_INLINE void token_addresses(const Segment& s, int begin, int end, Token* tokens) {
  const int64_t bytes = dtype_bytes(s.kv_dtype);
  const int64_t token_bytes = s.kv_stride_token * bytes, block_bytes = s.kv_stride_block * bytes;
  int n = 0;
  for (int t = begin; t < end;) {
    const int page = t / s.page_size, first = t - page * s.page_size;
    const int stop = s.page_size < end - page * s.page_size ? s.page_size : end - page * s.page_size;
    Token token = s.cache + s.blocks[page] * block_bytes + first * token_bytes;
    for (int i = first; i < stop; ++i, token += token_bytes) tokens[n++] = token;
    t += stop - first;
  }
  for (; n % 4 != 0; ++n) tokens[n] = tokens[n - 1];
}

// Unpacks fp8_ds_mla tokens; the list is padded to a multiple of 4 with the last one.
template <int D>
void unpack_fp8(const Token* tokens, int count, unsigned char* unpacked, Token* list) {
  constexpr int kBytes = D == MLA_DTYPE_FLOAT32 ? 4 : 2;
  for (int t = 0; t < count; ++t) {
    unsigned char* to = unpacked + (size_t)t * (kFp8Rank + kFp8Rope) * kBytes;
    list[t] = to;
    for (int i = 0; i < kFp8Rank; i += W) {
      const float scale = load_as<float>(tokens[t] + kFp8Rank + i / kFp8Group * 4);
      store<D>(to + i * kBytes, load_e4m3(tokens[t] + i) * scale);
    }
    const Token rope = tokens[t] + kFp8TokenBytes - kFp8Rope * 2;
    for (int i = 0; i < kFp8Rope; i += W)
      store<D>(to + (kFp8Rank + i) * kBytes, load<MLA_DTYPE_BFLOAT16>(rope + i * 2));
  }
  for (; count % 4 != 0; ++count) list[count] = list[count - 1];
}

// Turns the scores of one row into weights relative to the new maximum; returns the factor for what was summed so far.
template <class Ops>
MLA_INLINE float softmax_row(float* scores, int count, float scale, float* maximum, float* total) {
  const int padded = (count + W - 1) / W * W;
  for (int t = count; t < padded; ++t) scores[t] = -INFINITY * (scale < 0 ? -1.0f : 1.0f);
  vf best = splat(-INFINITY);
  for (int t = 0; t < padded; t += W) {
    const vf x = load_as<vf>(scores + t) * scale;
    best = vmax(x, best);
  }
  const float old = *maximum, peak = max_lanes(best);
  const float m = peak > old ? peak : old;
  vf sum = splat(0.0f);
  for (int t = 0; t < padded; t += W) {
    const vf x = load_as<vf>(scores + t) * scale - m;
    const vf weight = exp2_nonpositive(x);
    sum += weight;
    Ops::store_weights(scores, t, weight);
  }
  const float alpha = exp2_scalar(old - m);
  *maximum = m;
  *total = *total * alpha + sum_lanes(sum);
  return alpha;
}

template <class Ops>
void run_tile(const Segment& s, const State& state, const Scratch& w, int row_begin, int row_end, int count,
              int next_count) {
  const int width = s.width, stride = Ops::acc_stride(s.rank), rows = row_end - row_begin;
  float* scores = w.scores + (size_t)row_begin * kTile;
  const bool packed = s.kv_dtype == MLA_DTYPE_FP8_DS_MLA;
  if (packed) unpack_fp8<Ops::kCacheDtype>(w.tokens, count, w.unpacked, w.multiplied);
  const Token* tokens = packed ? w.multiplied : w.tokens;
  Fetch fetch = {w.next, next_count, packed ? kFp8TokenBytes : width * dtype_bytes(s.kv_dtype), 0, 0};
  Ops::scores(reinterpret_cast<const typename Ops::Q*>(w.q) + (size_t)row_begin * width, rows, tokens,
              (count + 3) / 4 * 4, width, scores, fetch);
  // -inf - -inf would be NaN, so a scale of 0 (uniform weights) is applied as the smallest positive number.
  const float scale = s.scale_log2 == 0.0f ? 1e-38f : s.scale_log2;
  for (int r = 0; r < rows; ++r)
    w.alpha[r] = softmax_row<Ops>(scores + (size_t)r * kTile, count, scale, state.maximum + row_begin + r,
                                  state.total + row_begin + r);
  Ops::accumulate(scores, rows, tokens, count, s.rank, w.alpha, state.sum + (size_t)row_begin * stride, stride, fetch);
}

template <class Ops>
void run_segment(const Segment& s, const State& state, unsigned char* base) {
  const int rows = s.row_end - s.row_begin;
  Scratch w = scratch_at<Ops>(base, rows, s.width);
  typename Ops::Q* q = reinterpret_cast<typename Ops::Q*>(w.q);
  for (int r = 0; r < rows; ++r) {
    const int row = s.row_begin + r;
    const int64_t offset = row / s.h_q * s.q_stride_seq + row % s.h_q * s.q_stride_head;
    Ops::load_query(q + (size_t)r * s.width, s.q + offset * dtype_bytes(s.q_dtype), s.q_dtype, s.width);
    state.maximum[r] = -INFINITY;
    state.total[r] = 0;
  }
  memset(state.sum, 0, sizeof(float) * rows * Ops::acc_stride(s.rank));
  const int first_query = s.row_begin / s.h_q, last_query = (s.row_end - 1) / s.h_q;
  auto seen = [&](int query) { return s.causal ? s.length - s.s_q + 1 + query : s.length; };
  const int limit = seen(last_query) < s.token_end ? seen(last_query) : s.token_end;
  int end = s.token_begin + kTile < limit ? s.token_begin + kTile : limit;
  if (s.token_begin < limit) token_addresses(s, s.token_begin, end, w.tokens);
  for (int t = s.token_begin; t < limit; t = end) {
    end = t + kTile < limit ? t + kTile : limit;
    const int next_end = end + kTile < limit ? end + kTile : limit;
    token_addresses(s, end, next_end, w.next);
    if (seen(first_query) >= end) {
      run_tile<Ops>(s, state, w, 0, rows, end - t, next_end - end);
    } else {  // queries see different numbers of these tokens; what one must not see may be NaN, so each goes alone
      for (int query = first_query; query <= last_query; ++query) {
        const int begin_row = query * s.h_q > s.row_begin ? query * s.h_q - s.row_begin : 0;
        const int end_row = (query + 1) * s.h_q < s.row_end ? (query + 1) * s.h_q - s.row_begin : rows;
        const int count = (seen(query) < end ? seen(query) : end) - t;
        if (count <= 0) continue;
        const int pad = (count + 3) / 4 * 4;
        Token saved[4];
        for (int i = count; i < pad; ++i) saved[i - count] = w.tokens[i], w.tokens[i] = w.tokens[count - 1];
        run_tile<Ops>(s, state, w, begin_row, end_row, count, next_end - end);
        for (int i = count; i < pad; ++i) w.tokens[i] = saved[i - count];
      }
    }
    Token* swap = w.tokens;
    w.tokens = w.next;
    w.next = swap;
  }
}

template <class Ops, int D>
void store_row_as(unsigned char* to, int rank, const State* parts, const float* weights, int num_parts, int row) {
  const int stride = Ops::acc_stride(rank), bytes = dtype_bytes(D);
  float line[64];
  for (int begin = 0; begin < rank; begin += 64) {
    const int n = rank - begin < 64 ? rank - begin : 64;
    for (int i = 0; i < n; i += W) {
      vf sum = splat(0.0f);
      for (int part = 0; part < num_parts; ++part)
        if (weights[part] != 0) sum += weights[part] * Ops::read_columns(parts[part].sum + (size_t)row * stride, begin + i);
      store_as(line + i, sum);
    }
    for (int i = 0; i < n; i += W) store<D>(to + (size_t)(begin + i) * bytes, load_as<vf>(line + i));
  }
}

template <class Ops>
void store_row(const Output& o, int row, int row_in_group, const State* parts, int num_parts) {
  float maximum = -INFINITY, total = 0, weights[1024];
  for (int part = 0; part < num_parts; ++part) {
    const float m = parts[part].maximum[row_in_group];
    maximum = m > maximum ? m : maximum;
  }
  for (int part = 0; part < num_parts; ++part) {
    const bool seen = parts[part].total[row_in_group] != 0;  // NaN counts as seen
    weights[part] = seen ? exp2_scalar(parts[part].maximum[row_in_group] - maximum) : 0.0f;
    if (seen) total += weights[part] * parts[part].total[row_in_group];
  }
  const int query = row / o.h_q, head = row % o.h_q;
  unsigned char* to = o.out + (query * o.stride_seq + head * o.stride_head) * dtype_bytes(o.dtype);
  float* lse = o.lse + (size_t)head * o.s_q + query;
  if (total == 0) {  // saw no token
    memset(to, 0, (size_t)o.rank * dtype_bytes(o.dtype));
    *lse = INFINITY;
    return;
  }
  *lse = maximum * 0.69314718055994530942f + logf(total);
  for (int part = 0; part < num_parts; ++part) weights[part] /= total;
  if (o.dtype == MLA_DTYPE_FLOAT32)
    store_row_as<Ops, MLA_DTYPE_FLOAT32>(to, o.rank, parts, weights, num_parts, row_in_group);
  else if (o.dtype == MLA_DTYPE_BFLOAT16)
    store_row_as<Ops, MLA_DTYPE_BFLOAT16>(to, o.rank, parts, weights, num_parts, row_in_group);
  else
    store_row_as<Ops, MLA_DTYPE_FLOAT16>(to, o.rank, parts, weights, num_parts, row_in_group);
}

}  // namespace
}  // namespace mla

#endif  // MLA_CPU_ONLINE_H_
