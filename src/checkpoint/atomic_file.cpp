// Files that appear whole or not at all: partial file, flush, rename, flush of the folder.
#include <turnout/checkpoint.h>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace turnout {
namespace {

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// The name still leads to the file that we hold: a writer before us may have renamed it while we waited for its lock.
bool same_file(int file, const std::string& path) {
  struct stat held {
  }, named{};
  return fstat(file, &held) == 0 && stat(path.c_str(), &named) == 0 && held.st_ino == named.st_ino &&
         held.st_dev == named.st_dev;
}

}  // namespace

void AtomicFile::fail(const char* action) const {
  throw FileError(path_ + ": cannot " + action + ": " + std::strerror(errno));
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)), partial_(path_ + ".partial") {
  struct stat there {};
  if (stat(path_.c_str(), &there) == 0 && !S_ISREG(there.st_mode))
    throw FileError(path_ + ": cannot be replaced by a file: is " +
                    (S_ISDIR(there.st_mode) ? "a folder" : "a device, pipe or socket"));
  file_ = open(partial_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (file_ < 0) fail("write");
  if (flock(file_, LOCK_EX | LOCK_NB) != 0 || !same_file(file_, partial_)) {
    close(file_);
    throw FileError(path_ + ": another process is writing it");
  }
  if (ftruncate(file_, 0) != 0) {
    close(file_);
    fail("write");
  }
}

AtomicFile::~AtomicFile() {
  if (!committed_) unlink(partial_.c_str());
  close(file_);
}

void AtomicFile::write(const void* data, size_t bytes) {
  constexpr size_t kMost = size_t{1} << 30;  // Linux writes at most 2 GiB − 4 KiB at once
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(file_, next, std::min(bytes, kMost));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail("write");
    }
    next += written;
    bytes -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  if (fsync(file_) != 0) fail("write");
  if (rename(partial_.c_str(), path_.c_str()) != 0) fail("rename the finished file to it");
  committed_ = true;
  const int folder = open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) fail("open the folder");
  const int flushed = fsync(folder);
  close(folder);
  // Some file systems (network, FUSE) refuse to flush a folder with EINVAL; the rename itself has happened.
  if (flushed != 0 && errno != EINVAL) fail("flush the folder");
}

void write_file(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content.data(), content.size());
  file.commit();
}

std::string read_file(const std::string& path, int64_t limit) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) throw FileError(path + ": cannot read: " + std::strerror(errno));
  struct stat status {};
  std::string content;
  std::string problem;
  if (fstat(file, &status) != 0) {
    problem = std::string("cannot read: ") + std::strerror(errno);
  } else if (!S_ISREG(status.st_mode)) {
    problem = "not a regular file";
  } else if (status.st_size > limit) {
    problem = "has " + std::to_string(status.st_size) + " bytes, expected at most " + std::to_string(limit);
  } else {
    content.resize(static_cast<size_t>(status.st_size));
    size_t done = 0;
    while (done < content.size()) {
      const ssize_t got = read(file, content.data() + done, content.size() - done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) problem = std::string("cannot read: ") + std::strerror(errno);
      if (got <= 0) break;
      done += static_cast<size_t>(got);
    }
    content.resize(done);
  }
  close(file);
  if (!problem.empty()) throw FileError(path + ": " + problem);
  return content;
}

}  // namespace turnout
