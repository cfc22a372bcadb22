// Helpers for the CUDA runtime: errors, the current device, one-time initialisation per device.
//
// The runtime is linked statically. It shares contexts, streams and memory with the one inside torch.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace msdd_fast {

// Throws std::runtime_error with CUDA's text.
inline void cuda_check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clear it, or the next call would report it again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                             ")");
}

// Makes a device current for a scope.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        cuda_check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device == before_) return;
        cuda_check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// Runs a function at the first call for each device; again if it threw.
class OncePerDevice {
  public:
    template <class Function>
    void run(int device, const Function& function) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto index = static_cast<std::size_t>(device);
        if (index >= done_.size()) done_.resize(index + 1, false);
        if (done_[index]) return;
        function();
        done_[index] = true;
    }

  private:
    std::mutex mutex_;
    std::vector<bool> done_;
};

inline int multiprocessors(int device) {
    int count = 0;
    cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

}  // namespace msdd_fast
