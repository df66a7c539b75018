// The kernel for an fp8_ds_mla cache and at most 16 query rows, where memory is the limit: nothing is unpacked to shared
// memory. A page's 64 raw tokens lie in shared memory as they do in the cache. A team of four warps works on a tile, each
// warp on one scale block, 128 latents of all tokens: it turns codes into the fragments of mma instructions twice, with
// the latents as the inner dimension (keys) and with the tokens as such (values). Scales are multiplied into the warp's
// scores and weights. The only exchange is that of the four warps' shares of the scores. Two teams take tiles in turn,
// and add up at an item's end.
#ifndef MLA_HOPPER_NARROW_CUH_
#define MLA_HOPPER_NARROW_CUH_

#include "barriers.cuh"
#include "codes.cuh"
#include "epilogue.cuh"
#include "load.cuh"
#include "merge.cuh"
#include "schedule.cuh"
#include "values.cuh"

namespace mla_hopper {

struct NarrowLayout {
  static constexpr int kRows = 16;
  static constexpr int kTeams = 2;
  static constexpr int kThreads = kTeams * 128 + 128;  // and a warp for the cache, one for the queries, two idle
  static constexpr int kStages = 0;                   // of Barriers: no unpacked tiles
  static constexpr int kRawSlots = 4;
  static constexpr int kTileBytesFp8 = kTileTokens * kTokenBytesFp8;
  static constexpr int kQuerySlabBytes = kRows * kColumns * 2;
  static constexpr int kExchangeBytes = 4 * 8 * 32 * 16;  // float4 [4 warps, 8 groups of 8 tokens, 32 lanes] of a team
  static constexpr int kQuery = 0;
  static constexpr int kExchange = kQuery + kSlabs * kQuerySlabBytes;
  static constexpr int kRaw = kExchange + kTeams * kExchangeBytes;
  static constexpr int kTotals = kRaw + kRawSlots * kTileBytesFp8;  // float2[teams, 16]: maximum and sum of a row
  static constexpr int kOutRows = kTotals + kTeams * kRows * 8;     // as in Layout
  static constexpr int kLseRows = kOutRows + 64 * 8;
  static constexpr int kSplits = kLseRows + 64 * 4;
  static constexpr int kBarriers = kSplits + 32;
  static constexpr int kBytes = kBarriers + (2 + 2 * kRawSlots + kTeams) * 8;
  static constexpr int kRequest = kBytes + 1024;
  static_assert(kRequest <= 232448, "more shared memory than a CTA can have");
};

// Named barriers beside those of barriers.cuh.
constexpr int kBothTeams = 1;
constexpr int kTeamBarrier = 2;  // and 3

struct NarrowBarriers : Barriers<NarrowLayout> {
  __device__ __forceinline__ explicit NarrowBarriers(uint32_t base) : Barriers<NarrowLayout>{base} {}
  __device__ __forceinline__ uint32_t raw_empty(uint32_t slot) const { return raw_full(NarrowLayout::kRawSlots + slot); }
  __device__ __forceinline__ uint32_t exchange_empty(int team) const { return raw_empty(NarrowLayout::kRawSlots + team); }

  __device__ __forceinline__ void init() const {
    mbarrier_init(query_full(), 1);
    mbarrier_init(query_empty(), 4 * NarrowLayout::kTeams);
    for (int slot = 0; slot < NarrowLayout::kRawSlots; ++slot) {
      mbarrier_init(raw_full(slot), 1);
      mbarrier_init(raw_empty(slot), 4);
    }
    for (int team = 0; team < NarrowLayout::kTeams; ++team) mbarrier_init(exchange_empty(team), 4);
    mbarrier_init_fence();
  }
};

// All lanes of the warp are done with what the barrier guards.
__device__ __forceinline__ void warp_arrive(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(barrier);
}

// Codes times 2^-120 times weights times kWeightScale, or query times kQueryScale: both stay in float32's normal range.
constexpr float kWeightScale = 0x1p100f;
constexpr float kQueryScale = 0x1p20f;

// The query rows of one warp's latents and its quarter of the rope, as A fragments. Their k runs as load_keys() takes it:
// fragment 4 l + s has latents 32 c + 16 l + 4 s to + 3 of the block, fragment 8 rope values 16 block + 4 c to + 3.
struct QueryFragments {
  uint32_t value[9][4];

  __device__ __forceinline__ void load(const char* slabs, int block, int lane) {
    const int g = lane / 4, c = lane & 3;
    const __nv_bfloat162 factor = __float2bfloat162_rn(kQueryScale);
#pragma unroll
    for (int l = 0; l < 2; ++l) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // A 16-byte vector: k 0 to 7 of 16, for steps 2 h and 2 h + 1.
          const char* row = slabs + (2 * block + c / 2) * NarrowLayout::kQuerySlabBytes + (g + 8 * i) * 128;
          const uint4 v = *reinterpret_cast<const uint4*>(row + (((4 * (c & 1) + 2 * l + h) ^ g) << 4));
          const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const __nv_bfloat162 scaled = __hmul2(reinterpret_cast<const __nv_bfloat162&>(word[e]), factor);
            value[4 * l + 2 * h + e / 2][i + 2 * (e & 1)] = reinterpret_cast<const uint32_t&>(scaled);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const char* row = slabs + 8 * NarrowLayout::kQuerySlabBytes + (g + 8 * i) * 128;
      const uint2 v = *reinterpret_cast<const uint2*>(row + (((2 * block + c / 2) ^ g) << 4) + 8 * (c & 1));
      value[8][i] = v.x;
      value[8][i + 2] = v.y;
    }
  }
};

template <typename V>
__device__ __forceinline__ V load_shared(uint32_t address);
template <>
__device__ __forceinline__ uint4 load_shared<uint4>(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ uint2 load_shared<uint2>(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
template <>
__device__ __forceinline__ float load_shared<float>(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(v) : "r"(address));
  return v;
}

// This warp's share of the scores of a tile: its block's latents times the scales, and its quarter of the rope. s[j] has
// tokens 8 j + 2 c and the next for rows g and g + 8; scale[j] has these tokens' scales times kWeightScale, 0 for tokens
// from `used` on, whose memory may hold anything.
__device__ __forceinline__ void share_of_scores(float (&s)[8][4], float (&scale)[8][2], const QueryFragments& query,
                                                uint32_t raw, int block, int lane, int used) {
  const int g = lane / 4, c = lane & 3;
  const uint32_t token = raw + g * kTokenBytesFp8;  // and every eighth after it
  const uint32_t codes = token + block * 128 + c * 32;
  const uint32_t scales = raw + 2 * c * kTokenBytesFp8 + kLatent + 4 * block;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      scale[j][e] = load_shared<float>(scales + (8 * j + e) * kTokenBytesFp8) * kWeightScale;
      s[j][e] = s[j][2 + e] = 0.f;
    }
  }
#pragma unroll
  for (int l = 0; l < 2; ++l) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint4 v = load_shared<uint4>(codes + 8 * j * kTokenBytesFp8 + 16 * l);
      const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        mma(s[j], query.value[4 * l + k], shifted_codes(byte_pair<0, 1>(word[k], word[k])),
            shifted_codes(byte_pair<2, 3>(word[k], word[k])));
      }
    }
  }
  if (used < kTileTokens) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (8 * j + 2 * c >= used) scale[j][0] = 0.f;
      if (8 * j + 2 * c + 1 >= used) scale[j][1] = 0.f;
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint2 v = load_shared<uint2>(token + 8 * j * kTokenBytesFp8 + kLatent + 16 + block * 32 + c * 8);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] *= scale[j][e & 1];
    mma(s[j], query.value[8], v.x, v.y);
  }
}

// o += weights x values of this warp's block. o[q][i] has latents 64 q + 16 c + i and that plus 8, rows g and g + 8.
__device__ __forceinline__ void add_values(float (&o)[2][8][4], const uint32_t (&weight)[4][4], uint32_t raw, int block,
                                           int lane) {
  const uint32_t codes = raw + 2 * (lane & 3) * kTokenBytesFp8 + block * 128 + lane / 4 * 8;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      uint2 v[4];  // 8 latents of tokens 2 c, 2 c + 1, 2 c + 8, 2 c + 9
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        v[e] = load_shared<uint2>(codes + (16 * k + (e & 1) + 8 * (e / 2)) * kTokenBytesFp8 + 64 * q);
      }
#define MLA_ADD(I, WORD)                                                              \
  mma(o[q][I], weight[k], shifted_codes(byte_pair<I % 4, 4 + I % 4>(v[0].WORD, v[1].WORD)), \
      shifted_codes(byte_pair<I % 4, 4 + I % 4>(v[2].WORD, v[3].WORD)))
      MLA_ADD(0, x);
      MLA_ADD(1, x);
      MLA_ADD(2, x);
      MLA_ADD(3, x);
      MLA_ADD(4, y);
      MLA_ADD(5, y);
      MLA_ADD(6, y);
      MLA_ADD(7, y);
#undef MLA_ADD
    }
  }
}

// The order of a partial result's elements, for merge(): see store_part().
struct NarrowOrder {
  template <typename T>
  static __device__ __forceinline__ void store(const RowPair<T>& rows, int unit, int lane, const float4 (&sum)[4]) {
    const int column = unit / 2 * 64 + 16 * (lane & 3) + 4 * (unit & 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (rows.row[i] == nullptr) continue;
      const uint2 first = i ? make_uint2(pack(sum[0].z, sum[1].z, T()), pack(sum[2].z, sum[3].z, T()))
                            : make_uint2(pack(sum[0].x, sum[1].x, T()), pack(sum[2].x, sum[3].x, T()));
      const uint2 second = i ? make_uint2(pack(sum[0].w, sum[1].w, T()), pack(sum[2].w, sum[3].w, T()))
                             : make_uint2(pack(sum[0].y, sum[1].y, T()), pack(sum[2].y, sum[3].y, T()));
      *reinterpret_cast<uint2*>(rows.row[i] + column) = first;
      *reinterpret_cast<uint2*>(rows.row[i] + column + 8) = second;
    }
  }
};

// 64 finished latents of a warp, o[i] times scale[0] or scale[1], to the caller's output.
template <typename T>
__device__ __forceinline__ void store_rows(const RowPair<T>& rows, int column, int lane, const float (&o)[8][4],
                                           const float (&scale)[2]) {
  column += 16 * (lane & 3);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows.row[i] == nullptr) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        word[k] = pack(o[2 * k][2 * i + e] * scale[i], o[2 * k + 1][2 * i + e] * scale[i], T());
      }
      *reinterpret_cast<uint4*>(rows.row[i] + column + 8 * e) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

// The same, times scale, to the workspace: unit 2 n + h of 16 rows x 32 columns has o[4 h] to o[4 h + 3] of the n-th 64
// latents.
__device__ __forceinline__ void store_part(float4* part, int lane, const float (&o)[8][4], const float (&scale)[2]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    part[i * 32 + lane] = make_float4(o[i][0] * scale[0], o[i][1] * scale[0], o[i][2] * scale[1], o[i][3] * scale[1]);
  }
}

template <typename T>
__device__ __forceinline__ void consume_tiles(const Params& params, Schedule& schedule, const NarrowBarriers& barriers,
                                              char* smem, uint32_t base, int cta, int thread) {
  using L = NarrowLayout;
  const int lane = thread & 31;
  const int block = thread / 32 & 3;
  const int team = thread / 128;
  const int g = lane / 4, c = lane & 3;
  const RowTable table = row_table<L>(smem);
  float4* exchange = reinterpret_cast<float4*>(smem + L::kExchange);
  float2* totals = reinterpret_cast<float2*>(smem + L::kTotals);
  int hidden[2] = {0, 0};  // tokens that rows g and g + 8 do not see, counted from the end
  if (params.causal) {
#pragma unroll
    for (int i = 0; i < 2; ++i) hidden[i] = max(0, params.s_q - 1 - (g + 8 * i) / params.h_q);
  }
  const int always_seen = params.causal ? params.s_q - 1 : 0;

  Work work;
  uint32_t tile = 0;   // of the CTA's stream
  uint32_t items = 0;
  uint32_t uses = 0;   // of this team's exchange buffer
  while (schedule.next(work)) {
    QueryFragments query;
    mbarrier_wait(barriers.query_full(), items & 1);
    query.load(smem + L::kQuery, block, lane);
    warp_arrive(barriers.query_empty(), lane);

    float o[2][8][4];
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i / 32][i / 4 % 8][i % 4] = 0.f;
    float maximum[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.f, 0.f};
#pragma unroll 1
    for (int t = work.first + ((tile ^ team) & 1); t < work.last; t += 2) {
      const uint32_t index = tile + (t - work.first);
      const uint32_t slot = index % L::kRawSlots;
      const uint32_t raw = base + L::kRaw + slot * L::kTileBytesFp8;
      const int used = work.length - t * kTileTokens;
      mbarrier_wait(barriers.raw_full(slot), index / L::kRawSlots & 1);
      float s[8][4];
      float scale[8][2];
      share_of_scores(s, scale, query, raw, block, lane, used);

      // The other warps' shares, added in an order that gives all four the same bits.
      float4* shares = exchange + team * (L::kExchangeBytes / 16) + lane;
      mbarrier_wait(barriers.exchange_empty(team), (uses & 1) ^ 1);
#pragma unroll
      for (int j = 0; j < 8; ++j) shares[(block * 8 + j) * 32] = make_float4(s[j][0], s[j][1], s[j][2], s[j][3]);
      named_sync(kTeamBarrier + team, 128);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float4 x = shares[((block ^ 1) * 8 + j) * 32];
        const float4 y = shares[((block ^ 2) * 8 + j) * 32];
        const float4 z = shares[((block ^ 3) * 8 + j) * 32];
        s[j][0] = (s[j][0] + x.x) + (y.x + z.x);
        s[j][1] = (s[j][1] + x.y) + (y.y + z.y);
        s[j][2] = (s[j][2] + x.z) + (y.z + z.z);
        s[j][3] = (s[j][3] + x.w) + (y.w + z.w);
      }
      warp_arrive(barriers.exchange_empty(team), lane);
      ++uses;

      // Online softmax in log2 units.
      if (params.negative) {
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i / 4][i % 4] = -s[i / 4][i % 4];
      }
      if (used < kTileTokens + always_seen) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int limit = used - hidden[i] - 2 * c - 8 * j;
            if (limit <= 0) s[j][2 * i] = -INFINITY;
            if (limit <= 1) s[j][2 * i + 1] = -INFINITY;
          }
        }
      }
      float alpha[2];
      uint32_t weight[4][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = s[0][2 * i];
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        largest = fmaxf(maximum[i], largest * params.scale_log2);
        const float reference = largest == -INFINITY ? 0.f : largest;
        alpha[i] = exp2_approximate(maximum[i] - reference);
        maximum[i] = largest;
        float partial = 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float x = exp2_approximate(s[j][2 * i] * params.scale_log2 - reference);
          const float y = exp2_approximate(s[j][2 * i + 1] * params.scale_log2 - reference);
          partial += x + y;
          weight[j / 2][2 * (j & 1) + i] = pack(x * scale[j][0], y * scale[j][1], T());
        }
        sum[i] = sum[i] * alpha[i] + partial;
      }
      if (!__all_sync(kAllLanes, alpha[0] == 1.f && alpha[1] == 1.f)) {
#pragma unroll
        for (int i = 0; i < 64; ++i) o[i / 32][i / 4 % 8][i % 4] *= alpha[i / 2 % 2];
      }
      add_values(o, weight, raw, block, lane);
      warp_arrive(barriers.raw_empty(slot), lane);
    }
    tile += work.last - work.first;
    ++items;

    // Each team finishes half of every warp's latents: it gives the other team its share of the other half.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
    }
    mbarrier_wait(barriers.exchange_empty(team), (uses & 1) ^ 1);
    ++uses;
    float mine[8][4];
    float4* given = exchange + team * (L::kExchangeBytes / 16) + block * 256 + lane;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      given[j * 32] = team ? make_float4(o[0][j][0], o[0][j][1], o[0][j][2], o[0][j][3])
                           : make_float4(o[1][j][0], o[1][j][1], o[1][j][2], o[1][j][3]);
#pragma unroll
      for (int e = 0; e < 4; ++e) mine[j][e] = team ? o[1][j][e] : o[0][j][e];
    }
    if (block == 0 && c == 0) {
      totals[team * L::kRows + g] = make_float2(maximum[0], sum[0]);
      totals[team * L::kRows + g + 8] = make_float2(maximum[1], sum[1]);
    }
    named_sync(kBothTeams, 256);
    float factor[2][2];  // of the row, of its own team's and the other's
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 a = totals[g + 8 * i];
      const float2 b = totals[L::kRows + g + 8 * i];
      maximum[i] = fmaxf(a.x, b.x);
      const float reference = maximum[i] == -INFINITY ? 0.f : maximum[i];
      const float first = exp2_approximate(a.x - reference);
      const float second = exp2_approximate(b.x - reference);
      sum[i] = a.y * first + b.y * second;
      factor[i][0] = team ? second : first;
      factor[i][1] = team ? first : second;
    }
    const float4* taken = exchange + (1 - team) * (L::kExchangeBytes / 16) + block * 256 + lane;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float4 other = taken[j * 32];
      mine[j][0] = mine[j][0] * factor[0][0] + other.x * factor[0][1];
      mine[j][1] = mine[j][1] * factor[0][0] + other.y * factor[0][1];
      mine[j][2] = mine[j][2] * factor[1][0] + other.z * factor[1][1];
      mine[j][3] = mine[j][3] * factor[1][0] + other.w * factor[1][1];
    }
    warp_arrive(barriers.exchange_empty(1 - team), lane);

    constexpr float kUnit = 1.f / (0x1p-120f * kWeightScale);  // what o is too small by
    const bool states = team == 0 && block == 0 && c == 0;     // stores the rows' statistics
    if (work.parts == 1) {
      if (states) {
        store_lse(params, table, work.item, g, maximum[0], sum[0]);
        store_lse(params, table, work.item, g + 8, maximum[1], sum[1]);
      }
      const float inverse[2] = {sum[0] == 0.f ? 0.f : kUnit * __frcp_rn(sum[0]),
                                sum[1] == 0.f ? 0.f : kUnit * __frcp_rn(sum[1])};
      store_rows(RowPair<T>(params, table, work.item, g), block * 128 + team * 64, lane, mine, inverse);
    } else {
      const int slot = cta == work.head_group;
      if (states) {
        float2* stats = params.stats + (2 * cta + slot) * 64;
        stats[g] = make_float2(maximum[0], sum[0]);
        stats[g + 8] = make_float2(maximum[1], sum[1]);
      }
      if (thread == 0) {
        reinterpret_cast<Split*>(smem + L::kSplits)[slot] = {work.item, work.head_group, work.parts, cta - work.head_group};
      }
      const float unit[2] = {kUnit, kUnit};
      store_part(params.partial + (2 * cta + slot) * slot_elements(params) + (2 * block + team) * 256, lane, mine, unit);
      announce_part(params, work, 0, team, thread & 127);
    }
  }
}

// One warp: a page of raw tokens after another into the ring.
__device__ __forceinline__ void load_raw_tiles(const Params& params, Schedule& schedule, const NarrowBarriers& barriers,
                                               uint32_t raw, int lane) {
  using L = NarrowLayout;
  const uint64_t policy = schedule.cache_policy();
  Work work;
  uint32_t tile = 0;
  while (schedule.next(work)) {
    const int32_t* pages = params.block_table + work.item * params.block_table_stride;
#pragma unroll 1
    for (int chunk = work.first; chunk < work.last; chunk += 32) {
      const int mine = chunk + lane < work.last ? pages[chunk + lane] : 0;
      const int count = min(32, work.last - chunk);
#pragma unroll 1
      for (int i = 0; i < count; ++i, ++tile) {
        const int page = __shfl_sync(kAllLanes, mine, i);
        const uint32_t slot = tile % L::kRawSlots;
        mbarrier_wait(barriers.raw_empty(slot), (tile / L::kRawSlots & 1) ^ 1);
        if (lane == 0) {
          mbarrier_expect(barriers.raw_full(slot), L::kTileBytesFp8);
          bulk_copy(raw + slot * L::kTileBytesFp8, params.raw_cache + page * params.raw_stride, L::kTileBytesFp8,
                    barriers.raw_full(slot), policy);
        }
        __syncwarp();
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(NarrowLayout::kThreads, 1)
mla_decode_narrow_kernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap query_map,
                         const __grid_constant__ CUtensorMap) {
  using L = NarrowLayout;
  extern __shared__ char dynamic_smem[];
  const uint32_t unaligned = shared_address(dynamic_smem);
  const uint32_t base = (unaligned + 1023) & ~1023u;
  char* smem = dynamic_smem + (base - unaligned);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  const NarrowBarriers barriers(base + L::kBarriers);
  if (warp == 0) {
    if (lane == 0) barriers.init();
    if (lane < 2) reinterpret_cast<Split*>(smem + L::kSplits)[lane].parts = 0;
  } else if (warp < 3) {
    fill_row_table<L>(params, smem, 0, threadIdx.x - 32);
  } else if (warp == 8) {
    prefetch_block_table(params, lane);
  } else if (warp == 9) {
    if (lane == 0) prefetch_tensor_map(&query_map);
  }
  __syncthreads();

  const int cta = blockIdx.x;  // of as many groups: 16 rows are one tile of them
  Schedule schedule(params, cta, lane);
  if (warp >= 8) {
    shrink_registers<40>();
    if (warp == 8) {
      load_raw_tiles(params, schedule, barriers, base + L::kRaw, lane);
    } else if (warp == 9) {
      load_queries(params, &query_map, schedule, barriers, base + L::kQuery, 0, lane);
    }
  } else {
    grow_registers<224>();
    const int thread = threadIdx.x;
    consume_tiles<T>(params, schedule, barriers, smem, base, cta, thread);
    const RowTable table = row_table<L>(smem);
    if (schedule.has_empty_items) {
#pragma unroll 1
      for (int item = cta; item < params.batch; item += params.groups) {
        if (schedule.item_length(item) == 0) store_empty_item<T>(params, table, item, thread);
      }
    }
    named_sync(kMergeBarrier, kMergeThreads);  // both teams are done with the ring
#pragma unroll 1
    for (int slot = 0; slot < 2; ++slot) {
      const Split split = reinterpret_cast<const Split*>(smem + L::kSplits)[slot];
      if (split.parts > 0) {
        merge<T, NarrowOrder>(params, table, split, thread, reinterpret_cast<float*>(smem + L::kRaw));
      }
    }
  }
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_NARROW_CUH_
