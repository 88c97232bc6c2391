// Base64 (RFC 4648) over another stream.
#ifndef GPT2_TVM_SUPPORT_BASE64_H_
#define GPT2_TVM_SUPPORT_BASE64_H_

#include <tvm/support/io.h>

#include <cstdint>
#include <string>

namespace tvm {
namespace support {

class Base64OutStream : public Stream {
 public:
  explicit Base64OutStream(Stream* out) : out_(out) {}
  using Stream::Read;
  using Stream::Write;

  size_t Read(void*, size_t) override { TVM_FFI_THROW(RuntimeError) << "this stream is for writing"; }
  size_t Write(const void* data, size_t size) override {
    for (size_t i = 0; i < size; ++i) {
      bits_ = bits_ << 8 | static_cast<const uint8_t*>(data)[i];
      if (++bytes_ == 3) Flush();
    }
    return size;
  }
  // Write what is left, padded with "=".
  void Finish() {
    if (bytes_ != 0) Flush();
  }

 private:
  void Flush() {
    static const char* const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char text[4] = {'=', '=', '=', '='};
    bits_ <<= 8 * (3 - bytes_);
    for (int i = 0; i <= bytes_; ++i) text[i] = digits[bits_ >> (18 - 6 * i) & 63];
    out_->Write(static_cast<const void*>(text), sizeof(text));
    bits_ = 0;
    bytes_ = 0;
  }

  Stream* out_;
  uint32_t bits_ = 0;
  int bytes_ = 0;
};

class Base64InStream : public Stream {
 public:
  explicit Base64InStream(Stream* in) : in_(in) {}
  using Stream::Read;
  using Stream::Write;

  // Called once before reading; nothing has to be looked for.
  void InitPosition() {}
  size_t Read(void* data, size_t size) override {
    uint8_t* to = static_cast<uint8_t*>(data);
    size_t done = 0;
    while (done < size && (bits_left_ >= 8 || Fill())) {
      bits_left_ -= 8;
      to[done++] = static_cast<uint8_t>(bits_ >> bits_left_);
    }
    return done;
  }
  size_t Write(const void*, size_t) override {
    TVM_FFI_THROW(RuntimeError) << "this stream is for reading";
  }

 private:
  static int Digit(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
  }
  // Digits until there is a whole byte; false at the padding or the end. Line breaks are skipped.
  bool Fill() {
    char c;
    while (bits_left_ < 8) {
      if (in_->Read(static_cast<void*>(&c), 1) != 1 || c == '=') return false;
      int digit = Digit(c);
      if (digit < 0) continue;
      bits_ = bits_ << 6 | static_cast<uint32_t>(digit);
      bits_left_ += 6;
    }
    return true;
  }

  Stream* in_;
  uint32_t bits_ = 0;
  int bits_left_ = 0;
};

}  // namespace support
}  // namespace tvm

#endif  // GPT2_TVM_SUPPORT_BASE64_H_
