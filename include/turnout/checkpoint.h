// Tensors on disk: safetensors files, written atomically and read with suspicion.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace turnout {

/// Something is wrong with a file; the message names it and, where there is one, the tensor.
class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file that becomes visible whole or not at all.
///
/// Bytes go to "PATH.partial" in the same folder; commit() makes them PATH. A process killed at any moment leaves
/// the old PATH as it was; a left-over partial file is taken over by the next writer. Two writers of one path: the
/// second one is refused. What is there and no regular file, as /dev/stdout, stays: it is refused. Not thread-safe.
class AtomicFile {
 public:
  /// @throws FileError when the partial file cannot be opened or another process is writing it
  explicit AtomicFile(std::string path);
  /// Without commit(): removes the partial file.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// @throws FileError, for a full disk above all
  void write(const void* data, size_t bytes);
  /// Flushes the file to the disk, renames it, flushes the folder. @throws FileError
  void commit();

 private:
  [[noreturn]] void fail(const char* action) const;

  std::string path_;
  std::string partial_;
  int file_ = -1;
  bool committed_ = false;
};

/// Writes a whole file atomically. @throws FileError
void write_file(const std::string& path, std::string_view content);

/// @param limit most bytes that a sound file of this kind has
/// @throws FileError when it is missing, unreadable, no regular file or longer than `limit`
std::string read_file(const std::string& path, int64_t limit);

/// What a safetensors file holds.
struct TensorFile {
  std::map<std::string, at::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// Writes a safetensors file atomically: the old file stays whole until the new one is on the disk.
///
/// Order of tensors: wider types first, then by name; so the same content gives the same bytes.
/// @param content dense tensors on any device, float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2,
///        float8_e8m0fnu, (u)int64, (u)int32, (u)int16, (u)int8 or bool. No tensor is called "__metadata__".
/// @throws FileError naming the file; c10::ValueError or c10::TypeError naming the tensor
/// Format: github.com/huggingface/safetensors, little-endian.
void save_tensors(const std::string& path, const TensorFile& content);

/// Reads tensors into the CPU's memory.
///
/// Nothing in a file is believed: lengths, offsets and shapes are checked against the size of the file before anything
/// of that size is allocated. Offsets must tile the data without gap or overlap, as the format demands.
/// @param path a safetensors file, or a folder that holds `model.safetensors`, or the shards that its
///        `model.safetensors.index.json` names: files of the same folder, which together hold each tensor of the index
///        once, where it says, and no other
/// @param prefix only tensors whose name starts with it; shards that the index gives none of them are not opened
/// @return the tensors under their whole names. Metadata of shards is merged: the first shard that has a key wins
/// @throws FileError naming the file, and the tensor where one is to blame
TensorFile load_tensors(const std::string& path, const std::string& prefix = "");

/// As load_tensors, but without reading: the tensors view the files, mapped into memory, and keep the mapping alive.
///
/// A page is read when it is first touched, and shared with other processes that map the file. What is written into a
/// tensor stays in this process's memory; the file never changes. A file that is replaced atomically, as save_tensors
/// does it, leaves its mapping as it was; one that is shortened in place while it is mapped ends the process.
/// Tensors whose bytes do not lie at a multiple of their element's size are copied.
TensorFile map_tensors(const std::string& path, const std::string& prefix = "");

/// All parameters and buffers of a module by name, sharing memory with it.
std::map<std::string, at::Tensor> module_tensors(const torch::nn::Module& module);

/// Copies tensors into the parameters and buffers of a module. Nothing is copied unless all fit.
///
/// @param source how to call where they came from, such as a file's path
/// @throws FileError with one message that lists every key that is missing, unused, of a wrong shape or type
void load_into_module(torch::nn::Module& module, const std::map<std::string, at::Tensor>& tensors,
                      const std::string& source);

}  // namespace turnout
