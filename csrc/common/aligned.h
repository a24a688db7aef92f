// Zeroed memory on a cache line: packed weights and scratch space.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace mprec {

template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t count) : count_(count) {
    if (count == 0) return;
    // A large block starts on a huge page and asks for them: packed weights are streamed at every call.
    const size_t page = size_t{2} << 20, bytes = (count * sizeof(T) + 63) / 64 * 64;
    void* p = nullptr;
    if (posix_memalign(&p, bytes >= page ? page : 64, bytes) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE  // Linux
    if (bytes >= page) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    std::memset(p, 0, bytes);
    data_ = static_cast<T*>(p);
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~AlignedBuffer() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return count_; }
  // At least `count` elements; what they hold is unspecified.
  T* reserve(int64_t count) {
    if (count > count_) *this = AlignedBuffer(count);
    return data_;
  }

 private:
  void swap(AlignedBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
  }
  T* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace mprec
