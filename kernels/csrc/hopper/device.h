// What the host asks about the device, and remembers.
#ifndef MLA_HOPPER_DEVICE_H_
#define MLA_HOPPER_DEVICE_H_

#include <cuda_runtime.h>

#include <algorithm>

#include "params.cuh"

namespace mla_hopper {

constexpr int kDefaultCtas = 132;
constexpr int kDevices = 64;  // about which things are remembered

struct Device {
  int index = -1;
  int ctas = kDefaultCtas;
  int major = 0, minor = 0;
  cudaError_t error = cudaSuccess;
};

// The current device; attributes are asked once for each device.
inline Device current_device() {
  static Device known[kDevices];
  Device device;
  device.error = cudaGetDevice(&device.index);
  if (device.error != cudaSuccess || device.index >= kDevices) return device;
  Device& cached = known[device.index];
  if (cached.index < 0) {
    cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, device.index);
    cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, device.index);
    device.error = cudaDeviceGetAttribute(&device.ctas, cudaDevAttrMultiProcessorCount, device.index);
    if (device.error != cudaSuccess) return device;
    device.ctas = std::min(device.ctas, kMaxCtas);
    cached = device;
  }
  return cached;
}

}  // namespace mla_hopper

#endif  // MLA_HOPPER_DEVICE_H_
