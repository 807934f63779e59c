#include "cpu/step_once.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/on_demand.h"
#include "cpu/take.h"

namespace fasttrain {

void step_once(const Reader& reader, const py::list& items, const py::array_t<double, py::array::c_style>& rows,
               int threads) {
  if (rows.ndim() != 2 || rows.shape(0) != static_cast<py::ssize_t>(items.size()))
    throw std::invalid_argument("one row of coefficients for each item is needed");
  std::vector<Work> works(items.size());
  std::vector<Kept> keeps(items.size());
  for (size_t i = 0; i < works.size(); ++i) {
    const auto item = items[i].cast<py::tuple>();
    const RuleKernels& rule = rule_at(item[0].cast<int>());
    const bool wide = item[1].cast<bool>(), plain = item[4].is_none();
    if (rows.shape(1) < 1 + rule.coefficients + (plain ? 0 : kTail))
      throw std::invalid_argument(std::string(rule.name) + " has more coefficients than a row");
    const auto tensors = item[2].cast<py::tuple>();
    const auto extras = plain ? py::tuple() : item[4].cast<py::tuple>()[1].cast<py::tuple>();
    if (plain) {
      if (static_cast<int>(tensors.size()) != 2 + rule.states)
        throw std::invalid_argument(std::string(rule.name) + " has " + std::to_string(rule.states) + " states");
    } else {
      const auto kept = item[4].cast<py::tuple>();
      const auto codecs = kept[0].cast<std::vector<int>>();
      describe(&keeps[i], rule, wide, codecs, kept[2].cast<bool>(), kept[4].cast<std::tuple<i64, i64, i64>>());
      keeps[i].key = kept[3].cast<u64>();
      if (tensors.size() != codecs.size() || extras.size() != codecs.size())
        throw std::invalid_argument("as many tensors, second arrays (or Nones) and codecs are needed");
    }
    dlpack::Tensor now;
    Layout layout;
    Kind param;
    for (int s = 0; s < static_cast<int>(tensors.size()); ++s) {
      if (!reader.read(tensors[static_cast<size_t>(s)], &now)) throw std::invalid_argument("not a plain tensor");
      if (s == 0) {
        layout = Layout(now);
        param = Kind(now);
      }
      if (plain ? !layout.dense() || !take(works[i], s, now, layout, param)
                : !walkable(keeps[i], layout) || !take_main(keeps[i], s, now, layout))
        throw std::invalid_argument("tensors must be p, g and the rule's states, dense, in CPU memory, of one order");
      if (plain) continue;
      const py::object extra = extras[static_cast<size_t>(s)];
      if (extra.is_none() != (extra_size(keeps[i].operands[s].codec) == 0) ||
          (!extra.is_none() && (!reader.read(extra, &now) || !take_extra(keeps[i], s, now, layout))))
        throw std::invalid_argument("operand " + std::to_string(s) + "'s second array is not that of its codec");
    }
    prepare(works[i], rule, wide, layout, param);
    if (!plain) {
      works[i].kept = &keeps[i];
      works[i].kept_kernel = wide ? kept_kernels().wide : kept_kernels().narrow;
    }
    if (!item[3].is_none()) works[i].counter = counter_of(reader, item[3]);
    works[i].row = static_cast<int>(i);
  }
  Division division;
  for (const Work& work : works) division.add(work);
  division.close();
  const py::gil_scoped_release release;
  division.walk(rows.data(), rows.shape(1), threads);
}

}  // namespace fasttrain
