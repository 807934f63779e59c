#include "cpu/plan.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>

#include "cpu/reduce_bind.h"
#include "cpu/take.h"
#include "draws.h"

namespace fasttrain {

Plan::Plan(Reader reader, const std::vector<py::list>& groups) : reader_(std::move(reader)), ahead_(reader_.ahead()) {
  for (size_t group = 0; group < groups.size(); ++group) {
    group_sizes_.push_back(groups[group].size());
    for (py::handle param : groups[group]) {
      Entry entry;
      entry.param = py::reinterpret_borrow<py::object>(param);
      entry.group = static_cast<int>(group);
      entries_.push_back(std::move(entry));
    }
  }
}

Plan::RowKey Plan::row_key(const Entry& entry, double step) const {
  RowKey key{static_cast<u64>(entry.group)};
  std::memcpy(&key[1], &step, sizeof step);
  for (int i = 0; i < entry.running; ++i) {
    const Number& number = entry.numbers[i];
    std::memcpy(&key[static_cast<size_t>(2 + 2 * i)], number.at, number.bytes());
    key[static_cast<size_t>(3 + 2 * i)] = static_cast<u64>(number.kind.storage());
  }
  return key;
}

std::vector<std::tuple<int, double, size_t>> Plan::rows(bool each) {
  rows_.clear();
  std::map<RowKey, int> known;
  RowKey previous{};  // of the parameter before, most often the right one
  int row = -1;
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    if (!entry.active) continue;
    const double step = entry.work.counter.type != Counter::kNone ? entry.work.counter.read() + 1 : entry.fresh ? 1 : 2;
    const int next = static_cast<int>(rows_.size());
    if (each) {
      row = next;
    } else if (const RowKey key = row_key(entry, step); row < 0 || key != previous) {
      row = known.emplace(key, next).first->second;
      previous = key;
    }
    if (row == next) rows_.emplace_back(entry.group, step, i);
    entry.work.row = row;
  }
  return rows_;
}

// What depends on which entries are active: the division of the work, and the lists of what it writes.
void Plan::arrange() {
  division_.clear();
  written_.clear();
  widest_ = 0;
  any_random_ = any_running_ = false;
  for (const Entry& entry : entries_) {
    if (!entry.active) continue;
    division_.add(entry.work);
    widest_ = std::max(widest_, 1 + entry.work.rule->coefficients + (entry.arrays != nullptr ? kTail : 0));
    any_running_ |= entry.running != 0;
    written_.next();
    written_.add(entry.param, reader_);
    for (int i = 0; i < entry.kept; ++i) written_.add(entry.tensors[i], reader_);
    if (entry.arrays == nullptr) continue;
    for (const Arrays::Array& array : entry.arrays->all) written_.add(array.tensor, reader_);
    any_random_ |= entry.arrays->random;
  }
  division_.close();
  divided_ = true;
}

std::vector<Plan::Replaced> Plan::take_replaced(const std::vector<py::tuple>& replaced) const {
  std::vector<Replaced> found(replaced.size());
  for (size_t row = 0; row < replaced.size(); ++row) {
    const Entry& first = entries_[std::get<2>(rows_.at(row))];
    bool fit = static_cast<int>(replaced[row].size()) == first.running;
    for (size_t i = 0; fit && i < replaced[row].size(); ++i) {
      dlpack::Tensor now;
      fit = reader_.read(replaced[row][i], &now) && first.numbers[i].kind.matches(now) && Layout(now).elements() == 1;
      if (fit) found[row][i] = address(now);
    }
    if (!fit) throw std::invalid_argument("a running number is replaced by one of another type");
  }
  return found;
}

void Plan::run(const py::array_t<double, py::array::c_style>& rows, const py::object& keys, int threads,
               const py::function& increment, const std::vector<py::tuple>& replaced) {
  if (rows.ndim() != 2 || rows.shape(0) != static_cast<py::ssize_t>(rows_.size()))
    throw std::invalid_argument("one row of coefficients for each of rows() is needed");
  if (!divided_) arrange();
  if (rows.shape(1) < widest_) throw std::invalid_argument("a rule has more coefficients than a row");
  if (any_running_ && replaced.size() != rows_.size())
    throw std::invalid_argument("for each of rows() the running numbers after the step are needed");
  const std::vector<Replaced> numbers = take_replaced(replaced);
  if (any_random_) {
    const auto step_keys = py::array_t<u64, py::array::c_style>::ensure(keys);
    if (keys.is_none() || !step_keys || step_keys.ndim() != 1 || step_keys.shape(0) != rows.shape(0))
      throw std::invalid_argument("a codec is stochastic: one 64-bit key for each row is needed");
    for (Entry& entry : entries_)
      if (entry.active && entry.arrays != nullptr)
        entry.arrays->kept.key = parameter_key(step_keys.data()[entry.work.row], entry.arrays->identity);
  }
  if (!placed_) {
    std::vector<const Work*> works;
    for (const Entry& entry : entries_)
      if (entry.ready) works.push_back(&entry.work);
    one_by_one_ = share_memory(works);
    placed_ = true;
  }
  increment_versions(increment);
  {
    const py::gil_scoped_release release;
    division_.walk(rows.data(), rows.shape(1), one_by_one_ ? 1 : threads);
  }
  if (any_running_)
    for (Entry& entry : entries_)
      for (int i = 0; entry.active && i < entry.running; ++i)
        std::memmove(entry.numbers[i].at, numbers[static_cast<size_t>(entry.work.row)][static_cast<size_t>(i)],
                     entry.numbers[i].bytes());
  if (any_fresh_)
    for (Entry& entry : entries_) entry.fresh = entry.fresh && !entry.active;
  any_fresh_ = false;
  last_ = {division_.parameters != 0 ? 1 : 0, division_.bytes_read, division_.bytes_written, division_.parameters,
           division_.elements};
}

py::dict Plan::last() const {
  return py::dict(py::arg("launches") = last_.launches, py::arg("bytes_read") = last_.bytes_read,
                  py::arg("bytes_written") = last_.bytes_written, py::arg("parameters") = last_.parameters,
                  py::arg("elements") = last_.elements);
}

i64 Plan::version(int index) const {
  const Entry& entry = entries_.at(static_cast<size_t>(index));
  return entry.ready && entry.arrays != nullptr && entry.arrays->watched ? entry.arrays->version : -1;
}

py::tuple Plan::squares(int threads) const {
  std::vector<Summed> gradients;
  for (const Entry& entry : entries_)
    if (entry.active) gradients.push_back({entry.work.streams[1], entry.work.elements});
  return squares_as_python(gradients, threads);
}

void Plan::increment_versions(const py::function& increment) const {
  written_.increment(ahead_, increment);
  if (!zeroed_.empty()) increment(zeroed_);
  if (any_arrays_)
    for (const Entry& entry : entries_)
      if (entry.active && entry.arrays != nullptr && entry.arrays->watched)
        entry.arrays->version = reader_.version(entry.param);
}

}  // namespace fasttrain
