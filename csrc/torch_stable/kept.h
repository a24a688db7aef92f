// Weights packed for the kernels, kept from call to call.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "torch_stable/tensors.h"

namespace mprec::stable {

// Tensors have no version counter here, and an address does not say what lies there: constants of an
// AOTInductor model can be replaced in place, or its memory be another model's after it was unloaded. So what
// was packed is kept beside a copy of the bytes that it was made of, and a call compares all of them.
// Addresses, shapes and options only say where to look.
//
// This costs memory for the copy and a read of both a call: of half a megabyte, a decoder of 1024-128-16,
// some 20 microseconds. At most `most` are kept; then the one that was used the longest ago goes.
template <class Packed>
class Kept {
 public:
  static constexpr size_t most = 256;
  using Options = std::vector<int64_t>;

  // pack(copies) makes it of copies of the sources' bytes, which are contiguous. `options`: what else it is
  // made of, as many numbers at every call, the number of sources among them.
  template <class Pack>
  std::shared_ptr<const Packed> get(const std::vector<View>& sources, Options options, const Pack& pack) {
    for (const View& v : sources) {
      options.insert(options.end(), v.shape.begin(), v.shape.end());
      options.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(v.data)));
    }
    std::shared_ptr<const Entry> found = find(options);
    if (!found || !found->is_of(sources)) {
      found = std::make_shared<const Entry>(sources, pack);
      keep(options, found);
    }
    return {found, &found->packed};
  }

 private:
  struct Entry {
    std::vector<std::vector<char>> copies;
    Packed packed;

    template <class Pack>
    Entry(const std::vector<View>& sources, const Pack& pack)
        : copies(copied(sources)), packed(pack(copies)) {}

    bool is_of(const std::vector<View>& sources) const {
      for (size_t i = 0; i < copies.size(); ++i)
        if (std::memcmp(copies[i].data(), sources[i].data, copies[i].size()) != 0) return false;
      return true;
    }
    static std::vector<std::vector<char>> copied(const std::vector<View>& sources) {
      std::vector<std::vector<char>> copies;
      for (const View& v : sources) {
        int64_t bytes = v.item_bytes();
        for (const int64_t size : v.shape) bytes *= size;
        copies.emplace_back(v.data, v.data + bytes);
      }
      return copies;
    }
  };
  struct Slot {
    std::shared_ptr<const Entry> entry;
    uint64_t used;
  };

  std::shared_ptr<const Entry> find(const Options& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto slot = slots_.find(key);
    if (slot == slots_.end()) return nullptr;
    slot->second.used = ++now_;
    return slot->second.entry;
  }

  void keep(const Options& key, std::shared_ptr<const Entry> entry) {
    const std::lock_guard<std::mutex> lock(mutex_);
    slots_[key] = {std::move(entry), ++now_};
    if (slots_.size() <= most) return;
    auto oldest = slots_.begin();
    for (auto slot = slots_.begin(); slot != slots_.end(); ++slot)
      if (slot->second.used < oldest->second.used) oldest = slot;
    slots_.erase(oldest);
  }

  std::mutex mutex_;
  std::map<Options, Slot> slots_;
  uint64_t now_ = 0;
};

}  // namespace mprec::stable
