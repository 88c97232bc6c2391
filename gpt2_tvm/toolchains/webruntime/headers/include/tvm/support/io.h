// A byte stream, as TVM's runtime uses it: typed values in little-endian order, sizes as 64-bit integers.
#ifndef GPT2_TVM_SUPPORT_IO_H_
#define GPT2_TVM_SUPPORT_IO_H_

#include <tvm/ffi/endian.h>

#include <cstddef>
#include <cstdint>

namespace tvm {
namespace support {

template <typename T>
struct Serializer;  // serializer.h, which must be included before a stream is used

class Stream {
 public:
  virtual ~Stream() = default;
  // Read up to `size` bytes; returns how many there were.
  virtual size_t Read(void* data, size_t size) = 0;
  // Append `size` bytes; returns how many were taken.
  virtual size_t Write(const void* data, size_t size) = 0;

  template <typename T>
  bool Read(T* out) {
    return Serializer<T>::Read(this, out);
  }
  template <typename T>
  void Write(const T& value) {
    Serializer<T>::Write(this, value);
  }
  // Elements without their count.
  template <typename T>
  bool ReadArray(T* out, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      if (!Serializer<T>::Read(this, out + i)) return false;
    }
    return true;
  }
  template <typename T>
  void WriteArray(const T* values, size_t count) {
    for (size_t i = 0; i < count; ++i) Serializer<T>::Write(this, values[i]);
  }
};

}  // namespace support
}  // namespace tvm

#include <tvm/support/serializer.h>

#endif  // GPT2_TVM_SUPPORT_IO_H_
