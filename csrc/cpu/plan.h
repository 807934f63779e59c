// The step plan of an optimizer whose tensors live in CPU memory: a table of pointers, sizes and coefficient rows that
// is checked against the Python objects on every step, patched where something changed, and walked by all threads.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/reader.h"
#include "cpu/walk.h"
#include "cpu/written.h"

namespace fasttrain {

constexpr int kMaxRunning = 4;  // states of one number that the plan takes, for each parameter

class Plan {
 public:
  Plan(Reader reader, const std::vector<py::list>& groups);

  // Reads every gradient, state and pointer. Returns the indices of the parameters that have a gradient and must be
  // described (again) by `set` before `run`, or None if the parameter lists themselves changed.
  py::object scan(py::dict state, const std::vector<py::list>& groups);

  // Describes parameter `index`: `keys` are its states in `state`, then its step count if `counted`. `running` are the
  // keys of its states that are one number, whatever the parameter's shape.
  // False, and the parameter is left out, if its tensors are not dense, in CPU memory, of one order.
  //
  // If it is not plain, `kept` is a tuple (codecs, extra_keys, averaged, zero, identity, place, watched): the codecs of
  // p, g, the states and, if `averaged`, an EMA, whose key comes after those of the states; for each of these the key of
  // its second array, or None; whether the gradient is zeroed; what names the parameter in draws.h; its place there; and
  // whether `scan` reports it when somebody else wrote it. Bad codecs and keys raise.
  bool set(int index, int rule, bool wide, py::dict state, const py::tuple& keys, bool counted, bool fresh,
           const py::object& kept, const py::tuple& running);

  // The distinct (group, step) of the active parameters, in order of first use, and with each the index of the first
  // parameter that has them; step is the count of the step to come. Parameters whose running numbers differ, in a bit or
  // in their type, are told apart too. With `each`, one for every active parameter, in their order.
  std::vector<std::tuple<int, double, size_t>> rows(bool each);

  // Steps every active parameter, with one row of doubles for each of `rows()`: the gradient's scale, then coefficients,
  // then, for parameters that are not plain, clip, keep and add. `keys` has the step's key for each row, or is None if
  // no codec is stochastic. `increment` (torch.autograd.graph.increment_version) is called with the tensors that are
  // going to be written, list by list: before the walk, which evicts them from the cache. `replaced` has for each row
  // the running numbers after the step, tensors of the types that they have in the state, in the order of `running`.
  void run(const py::array_t<double, py::array::c_style>& rows, const py::object& keys, int threads,
           const py::function& increment, const std::vector<py::tuple>& replaced);

  // After `scan`: (sum of squares of the gradient of each active parameter, whether any element is infinite or NaN).
  py::tuple squares(int threads) const;

  // The version of a watched parameter after the plan's own last write of it, or -1 where that is not known.
  i64 version(int index) const;

  // Lets go of the gradients that `scan` found, so that another thread could not free them during the walk.
  void release();

  // What the last run did.
  py::dict last() const;

 private:
  static constexpr int kMaxKeys = kMaxStates + 1 + kMaxRunning;
  // A running number: where it is, and its type.
  struct Number {
    char* at = nullptr;
    Kind kind;

    bool take(const dlpack::Tensor& tensor);  // false if it is not one floating-point number in CPU memory
    size_t bytes() const { return kind.dtype.bits / 8; }
  };
  // What parameters of one row have in common, as words: group, step, and two for each running number.
  using RowKey = std::array<u64, 2 + 2 * kMaxRunning>;
  // Where the numbers are that replace those of a row.
  using Replaced = std::array<const char*, kMaxRunning>;
  // What an entry that is not plain has instead of `keys`, `tensors` and `kinds`.
  struct Arrays {
    struct Array {
      py::object key, tensor;
      Kind kind;
      Layout layout;
      char** at;  // in `kept`, or that of the counter or of a running number
    };
    std::vector<Array> all;  // all but p and g themselves
    Kept kept;
    u64 identity = 0;
    bool random = false, watched = false;
    i64 version = 0;  // of the parameter, after the last own write
  };
  // Everything that a scan compares with lies in the entry itself: with 10,000 parameters its cost is cache misses.
  struct Entry {
    py::object param;
    py::object state;  // the optimizer's dict for this parameter
    Ahead::Place last_grad;
    int group = 0;
    int kept = 0;         // number of keys: the states, the step count if there is one, the running numbers
    int running = 0;      // number of these
    bool ready = false;   // `set` has described it
    bool active = false;  // it is stepped by the next `run`
    bool fresh = false;   // its state is new (for rules whose optimizer keeps no step count)
    py::object keys[kMaxKeys], tensors[kMaxKeys];  // in `state` when it was described
    Kind kinds[2 + kMaxKeys];                      // of p, g, then `tensors`
    Number numbers[kMaxRunning];
    Layout layout;
    Work work;
    std::unique_ptr<Arrays> arrays;  // if it is not plain
  };
  bool patch(Entry& entry, py::handle grad, py::handle state);
  bool patch_arrays(Entry& entry);
  bool set_arrays(Entry& entry, const RuleKernels& rule, bool wide, py::dict state, const py::tuple& keys, bool counted,
                  const py::tuple& kept, const py::tuple& running);
  bool has_numbers(const py::dict& state, const py::tuple& running) const;
  void hold(Entry& entry, py::object grad);
  void fetch_ahead(size_t index) const;
  void fetch_arrays_ahead(size_t index) const;
  RowKey row_key(const Entry& entry, double step) const;
  void arrange();
  std::vector<Replaced> take_replaced(const std::vector<py::tuple>& replaced) const;
  void increment_versions(const py::function& increment) const;

  Reader reader_;
  Ahead ahead_;
  std::vector<Entry> entries_;
  std::vector<py::object> grads_;  // kept alive from `scan` to `release`
  py::list zeroed_;                // those of them that are zeroed
  std::vector<size_t> group_sizes_;
  std::vector<std::tuple<int, double, size_t>> rows_;
  Division division_;
  Written written_;                // by the active entries
  int widest_ = 0;                 // doubles in a row of the active entries at most
  bool any_running_ = false;       // whether an active entry has running numbers
  bool divided_ = false, any_fresh_ = false, any_arrays_ = false, any_random_ = false;
  bool placed_ = false, one_by_one_ = false;  // whether it is known, and whether parameters share memory
  struct Last {
    i64 launches = 0, bytes_read = 0, bytes_written = 0, parameters = 0, elements = 0;
  } last_;
};

}  // namespace fasttrain
