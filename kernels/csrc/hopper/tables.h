// What a debug build (-DMLA_DEBUG) checks besides: the lengths and the block table, read back before every launch.
// Other builds trust them, as reading them would make the host wait for the device.
#ifndef MLA_HOPPER_TABLES_H_
#define MLA_HOPPER_TABLES_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "mla_decode.h"

namespace mla_hopper {

// `fail` takes a status and printf's arguments. In a stream capture nothing can be read back, so nothing is checked.
template <typename Fail>
int32_t check_tables([[maybe_unused]] const mla_decode_params& p, [[maybe_unused]] const Fail& fail) {
#ifdef MLA_DEBUG
  const auto stream = static_cast<cudaStream_t>(p.stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  if (error == cudaSuccess && capture != cudaStreamCaptureStatusNone) return MLA_OK;
  const size_t width = p.max_blocks_per_seq;
  std::vector<int32_t> lengths(p.batch), table(p.batch * width);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(lengths.data(), p.cache_seqlens, lengths.size() * sizeof(int32_t), cudaMemcpyDeviceToHost,
                            stream);
  }
  if (error == cudaSuccess && width > 0) {
    error = cudaMemcpy2DAsync(table.data(), width * sizeof(int32_t), p.block_table,
                              std::max<size_t>(p.block_table_stride, width) * sizeof(int32_t), width * sizeof(int32_t),
                              p.batch, cudaMemcpyDeviceToHost, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) {
    return fail(MLA_ERROR_RUNTIME, "reading cache_seqlens and block_table back failed: %s", cudaGetErrorString(error));
  }
  for (int b = 0; b < p.batch; ++b) {
    const int64_t most = int64_t(width) * p.page_size;
    if (lengths[b] < 0 || lengths[b] > most) {
      return fail(MLA_ERROR_INVALID_ARGUMENT, "cache_seqlens[%d] is %d, expected 0 to %lld (max_blocks_per_seq * page_size)",
                  b, lengths[b], static_cast<long long>(most));
    }
    for (int i = 0; i < (lengths[b] + p.page_size - 1) / p.page_size; ++i) {
      const int32_t page = table[b * width + i];
      if (page < 0 || page >= p.num_blocks) {
        return fail(MLA_ERROR_INVALID_ARGUMENT, "block_table[%d, %d] is %d, expected 0 to %d (num_blocks - 1)", b, i,
                    page, p.num_blocks - 1);
      }
    }
  }
#endif
  return MLA_OK;
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_TABLES_H_
