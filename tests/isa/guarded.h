// Arrays between pages that nobody may touch, so that an access beyond either end is a fault.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace mprec::test {

// The end of the array (or its beginning) that abuts the forbidden page. The other end has slack of less
// than a page. Under AddressSanitizer both ends are exact: there the array is a heap block.
enum class Edge { end, begin };

template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t size, Edge edge = Edge::end) : size_(size) {
    const size_t bytes = sizeof(T) * static_cast<size_t>(size);
#ifdef __SANITIZE_ADDRESS__
    (void)edge;
    mapping_ = std::malloc(bytes + (bytes == 0));
    data_ = static_cast<T*>(mapping_);
#else
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (bytes + page - 1) / page * page;
    length_ = usable + 2 * page;
    mapping_ = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    char* const first = static_cast<char*>(mapping_) + page;
    if (usable && mprotect(first, usable, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = reinterpret_cast<T*>(edge == Edge::begin ? first : first + usable - bytes);
#endif
    std::memset(static_cast<void*>(data_), 0xA5, bytes);
  }
  ~Guarded() {
#ifdef __SANITIZE_ADDRESS__
    std::free(mapping_);
#else
    munmap(mapping_, length_);
#endif
  }
  Guarded(const Guarded&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t size_;
  void* mapping_;
  size_t length_ = 0;
  T* data_;
};

}  // namespace mprec::test
