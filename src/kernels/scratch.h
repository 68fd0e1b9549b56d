// Scratch memory kept between calls: fresh pages cost more than the arithmetic of a small layer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace turnout::kernels {

/// A block of scratch for one call, 2 MB aligned and advised to huge pages; contents are arbitrary.
/// Goes back to a pool of at most 256 MB when destroyed. Safe to take from several threads.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
  size_t bytes_;
};

/// Lays out the parts of one block: call take() for each part with no block to learn the size, then again with it.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ + used_;
    // 4 KB + 64 B between parts: equal parts must not land in the same cache sets
    used_ += (static_cast<size_t>(count) * sizeof(T) + 4095) / 4096 * 4096 + 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(p);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace turnout::kernels
