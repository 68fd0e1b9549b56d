// A regular file, open for reading or mapped into memory; every failure names it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace turnout {

class InputFile {
 public:
  /// @throws FileError when it is missing, unreadable or no regular file
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  [[noreturn]] void fail(const std::string& problem) const;
  /// @throws FileError when the file has become shorter
  void read_at(int64_t offset, void* data, int64_t bytes) const;
  int64_t size() const { return size_; }

  /// The whole file, for as long as the pointer is held: private pages, so that writing to them leaves the file alone.
  std::shared_ptr<char> map() const;

 private:
  std::string path_;
  int file_ = -1;
  int64_t size_ = 0;
};

}  // namespace turnout
