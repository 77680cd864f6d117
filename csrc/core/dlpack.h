// The DLPack 1.x ABI as this package sees it, declared from the public specification so that no
// framework header is needed. Only what crosses the border: a borrowed tensor and the current
// stream.
#pragma once

#include <cstddef>
#include <cstdint>

namespace distaya::dlpack {

enum class DeviceType : int32_t { cpu = 1, cuda = 2, cuda_host = 3, cuda_managed = 13 };
enum class Code : uint8_t {
  integer = 0,
  unsigned_integer = 1,
  floating = 2,
  bfloat = 4,
  boolean = 6
};

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// A view: shape and strides (in elements) point into the producer and live as long as the call.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

// Function table a framework hangs on its tensor type as the capsule `__dlpack_c_exchange_api__`.
// Only the last two entries are used here; the first three are declared for their size.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py;
  void* managed_tensor_to_py;
  int (*tensor_from_py)(void* py_object, Tensor* out);  // borrows; nonzero = Python error set
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

inline constexpr const char* kExchangeCapsule = "dlpack_exchange_api";

static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24, "DLTensor layout");
static_assert(offsetof(ExchangeApi, tensor_from_py) == 40, "DLPackExchangeAPI layout");

}  // namespace distaya::dlpack
