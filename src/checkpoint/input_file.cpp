// Reads of a regular file by offset, and its mapping into memory.
#include "checkpoint/input_file.h"

#include <turnout/checkpoint.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace turnout {

InputFile::InputFile(const std::string& path) : path_(path) {
  file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file_ < 0) fail(std::string("cannot read: ") + std::strerror(errno));
  struct stat status {};
  const bool regular = fstat(file_, &status) == 0 && S_ISREG(status.st_mode);
  size_ = status.st_size;
  if (!regular) {
    close(file_);
    fail("not a regular file");
  }
}

InputFile::~InputFile() { close(file_); }

void InputFile::fail(const std::string& problem) const { throw FileError(path_ + ": " + problem); }

void InputFile::read_at(int64_t offset, void* data, int64_t bytes) const {
  char* next = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t got = pread(file_, next, static_cast<size_t>(std::min<int64_t>(bytes, 1 << 30)), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(std::string("cannot read: ") + std::strerror(errno));
    if (got == 0) fail("ends early: it shrank while it was read");
    next += got;
    offset += got;
    bytes -= got;
  }
}

std::shared_ptr<char> InputFile::map() const {
  const auto bytes = static_cast<size_t>(size_);
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file_, 0);
  if (pages == MAP_FAILED) fail(std::string("cannot map it into memory: ") + std::strerror(errno));
  return {static_cast<char*>(pages), [bytes](char* data) { munmap(data, bytes); }};
}

}  // namespace turnout
