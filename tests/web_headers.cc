// Exercises the headers of gpt2_tvm/toolchains/webruntime/headers on this machine; see test_web_runtime.py.
#include <3rdparty/compiler-rt/builtin_fp16.h>
#include <src/support/arena.h>
#include <src/support/base64.h>
#include <src/support/bytes_io.h>
#include <src/support/ring_buffer.h>
#include <src/support/utils.h>
#include <tvm/ffi/dtype.h>
#include <tvm/support/cuda/nvtx.h>
#include <tvm/support/serializer.h>

#include <cstdio>
#include <iostream>
#include <iterator>

using namespace tvm;           // NOLINT
using namespace tvm::support;  // NOLINT

std::string Input() { return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()}; }

bool ReadAll(Stream* in) {
  int32_t number;
  std::string name;
  std::vector<int64_t> values;
  std::unordered_map<std::string, std::string> map;
  ffi::Array<DLDataType> dtypes;
  return in->Read(&number) && number == 7 && in->Read(&name) && name == "name" && in->Read(&values) &&
         values == std::vector<int64_t>{-1, 5} && in->Read(&map) && map.at("k") == "v" && in->Read(&dtypes) &&
         dtypes.size() == 2 && dtypes[1].bits == 8;
}

// Pieces of changing sizes go in and come out in order, by copies and by callbacks.
bool Ring() {
  RingBuffer ring;
  unsigned char next_in = 0, next_out = 0;
  size_t inside = 0;
  for (int round = 0; round < 2000; ++round) {
    std::vector<unsigned char> piece(static_cast<size_t>(round * 7 % 53));
    for (auto& byte : piece) byte = next_in++;
    if (round % 2) {
      ring.Write(piece.data(), piece.size());
    } else {
      size_t half = piece.size() / 2;  // the callback may fill less than it was offered
      size_t got = ring.WriteWithCallback(
          [&](void* to, size_t) {
            if (half) std::memcpy(to, piece.data(), half);
            return half;
          },
          piece.size());
      if (got != half) return false;
      ring.Write(piece.data() + half, piece.size() - half);
    }
    inside += piece.size();
    size_t out = std::min<size_t>(inside, static_cast<size_t>(round * 11 % 61));
    std::vector<unsigned char> back(out);
    if (round % 3) {
      ring.Read(back.data(), out);
    } else if (ring.ReadWithCallback(
                   [&](const void* from, size_t size) {
                     if (size) std::memcpy(back.data(), from, size);
                     return size;
                   },
                   out) != out) {
      return false;
    }
    inside -= out;
    for (unsigned char byte : back) {
      if (byte != next_out++) return false;
    }
    if (ring.bytes_available() != inside) return false;
  }
  return true;
}

int main(int, char** argv) {
  std::string what = argv[1], input = Input(), output;
  BytesInStream in(input);
  BytesOutStream out(&output);
  NVTXScopedRange range("main");
  if (what == "base64") {
    Base64OutStream text(&out);
    text.Write(input.data(), input.size() / 3);  // in two pieces, neither a whole number of groups
    text.Write(input.data() + input.size() / 3, input.size() - input.size() / 3);
    text.Finish();
  } else if (what == "from-base64") {
    Base64InStream text(&in);
    text.InitPosition();
    char piece[10];
    while (size_t got = text.Read(piece, sizeof(piece))) output.append(piece, got);
  } else if (what == "half") {
    for (size_t i = 0; i < input.size(); i += 2) {
      uint16_t bits;
      std::memcpy(&bits, &input[i], 2);
      float wide = __extendXfYf2__<uint16_t, uint16_t, 10, float, uint32_t, 23>(bits);
      out.Write(static_cast<const void*>(&wide), sizeof(wide));
    }
  } else if (what == "write") {
    out.Write(int32_t{7});
    out.Write(std::string("name"));
    out.Write(std::vector<int64_t>{-1, 5});
    out.Write(std::unordered_map<std::string, std::string>{{"k", "v"}});
    out.Write(ffi::Array<DLDataType>{DLDataType{2, 32, 1}, DLDataType{0, 8, 4}});
  } else if (what == "read") {
    output = ReadAll(&in) ? "ok" : "short";
  } else if (what == "ring") {
    Arena arena;
    int* numbers = arena.allocate_<int>(1000);
    for (int i = 0; i < 1000; ++i) numbers[i] = i;
    char* other = arena.allocate_<char>(3);
    other[0] = 'x';
    bool fine = numbers[999] == 999 && StartsWith("abc", "ab") && !StartsWith("a", "ab") && Ring();
    arena.RecycleAll();
    output = fine ? "ok" : "wrong";
  }
  std::fwrite(output.data(), 1, output.size(), stdout);
  return 0;
}
