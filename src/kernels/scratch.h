// Scratch memory kept between calls: fresh pages cost more than the arithmetic of a small layer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace turnout::kernels {

/// Takes the parts of one block, one after the other; without a block it adds up their sizes.
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

/// A block of scratch for one call, 2 MB aligned and advised to huge pages; contents are arbitrary.
/// Goes back to a pool of at most 256 MB when destroyed. Safe to take from several threads.
class Scratch {
 public:
  /// @param layout called as layout(arena) to take the parts: without a block to learn the size, then again with it
  template <class Layout>
  static Scratch of(Layout&& layout) {
    Arena sizes(nullptr);
    layout(sizes);
    return {sizes.used(), layout};
  }
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  explicit Scratch(size_t bytes);
  template <class Layout>
  Scratch(size_t bytes, Layout& layout) : Scratch(bytes) {
    Arena arena(data_);
    layout(arena);
  }
  char* data_;
  size_t bytes_;
};

}  // namespace turnout::kernels
