// Fetch what a scan of many tensors is going to touch into the cache, ahead of time.
//
// In a training loop the forward and backward passes have evicted every object of an optimizer by the time it steps,
// and a scan follows pointers: object, tensor, storage, autograd data. One miss behind the other, at 10,000 parameters
// these were three quarters of its time.
#pragma once
#include <pybind11/pybind11.h>

namespace fasttrain {

namespace py = pybind11;

// Where torch keeps what, as far as prefetching needs it. Nothing but prefetches depends on it, and it is used only
// where torch's own `_cdata` confirmed it.
class Ahead {
  static constexpr int kTensor = 0;                              // of an object's words after its header
  static constexpr int kTensorLines = 4;                         // 208 bytes, not aligned to lines
  static constexpr int kStorage = 2, kAutograd = 3, kVersion = 5;  // of a tensor's words

 public:
  Ahead() = default;
  explicit Ahead(py::handle tensor) {
    const auto of = [](py::handle object) { return object.attr("_cdata").cast<std::uintptr_t>(); };
    const char* found = object_words(tensor)[kTensor];
    known_ = reinterpret_cast<std::uintptr_t>(found) == of(tensor) &&
             reinterpret_cast<const std::uintptr_t*>(found)[kStorage] == of(tensor.attr("untyped_storage")());
  }

  void object(py::handle object) const { lines(reinterpret_cast<const char*>(object.ptr()), 1); }

  // `object` is in the cache by now.
  void tensor(py::handle object) const {
    if (known_) lines(object_words(object)[kTensor], kTensorLines);
  }

  // `object` and its tensor are in the cache by now.
  void inside(py::handle object) const {
    if (!known_) return;
    const auto* words = reinterpret_cast<const char* const*>(object_words(object)[kTensor]);
    lines(words[kStorage], 2);
    lines(words[kAutograd], 2);
    lines(words[kVersion], 1);
  }

  void dict(py::handle object) const {
    if (known_) lines(reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(object.ptr())->ma_keys), 3);
  }

  // Where a gradient lies. The next one is often put where the last one was; if not, nothing is lost.
  struct Place {
    const char *object = nullptr, *tensor = nullptr, *storage = nullptr;

    void fetch() const {
      lines(object, 1);
      lines(tensor, kTensorLines);
      lines(storage, 2);
    }
  };
  Place place(py::handle object) const {
    if (!known_) return {};
    const char* tensor = object_words(object)[kTensor];
    return {reinterpret_cast<const char*>(object.ptr()), tensor, reinterpret_cast<const char* const*>(tensor)[kStorage]};
  }

  static void lines(const char* address, int count) {
    for (int line = 0; line < count; ++line) __builtin_prefetch(address + 64 * line);
    asm volatile("");  // GCC takes a function that does nothing but prefetch for one without effect, and drops its calls
  }

 private:
  static const char* const* object_words(py::handle object) {
    return reinterpret_cast<const char* const*>(reinterpret_cast<const char*>(object.ptr()) + sizeof(PyObject));
  }

  bool known_ = false;
};

}  // namespace fasttrain
