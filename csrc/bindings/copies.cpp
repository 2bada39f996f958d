// Copies between arrays whose elements lie in another order: what NumPy does one element at a time, each of them on a
// cache line of its own.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arrays.hpp"
#include "fastnorm/parallel.hpp"
#include "fastnorm/plan.hpp"

namespace py = pybind11;

namespace {

// Elements of a tile, across and down. It goes through a buffer in a first-level cache, so that both arrays are read
// and written in pieces of whole lines: rows whole pages apart would all fall into one set of the cache.
constexpr py::ssize_t kTile = 64;
// The shortest axis for which that pays.
constexpr py::ssize_t kShortest = 16;
// Elements below which a copy is not worth a second look.
constexpr py::ssize_t kLeast = 1 << 12;

struct Axis {
  py::ssize_t length, from, to;  // strides in bytes
};

// Elements side by side in the target along one axis, in the source along another.
struct Transposition {
  const char* source;
  char* target;
  Axis across, down;
  std::vector<Axis> rest;

  py::ssize_t strips() const { return (down.length + kTile - 1) / kTile; }
  py::ssize_t tasks() const {
    py::ssize_t count = strips();
    for (const Axis& axis : rest) count *= axis.length;
    return count;
  }
};

// Strip `task` of all: kTile elements of the source's rows, for everything that lies across.
template <class T>
void copy_strip(const Transposition& all, std::size_t task) {
  auto index = static_cast<py::ssize_t>(task);
  const py::ssize_t first = index % all.strips() * kTile, last = std::min(all.down.length, first + kTile);
  index /= all.strips();
  const char* source = all.source + first * all.down.from;
  char* target = all.target + first * all.down.to;
  for (const Axis& axis : all.rest) {
    source += index % axis.length * axis.from;
    target += index % axis.length * axis.to;
    index /= axis.length;
  }
  constexpr auto kPitch = kTile + 16 / static_cast<py::ssize_t>(sizeof(T));
  T tile[kTile * kPitch];
  const auto down = static_cast<std::size_t>(last - first);
  for (py::ssize_t begin = 0; begin < all.across.length; begin += kTile) {
    const py::ssize_t across = std::min(kTile, all.across.length - begin);
    for (py::ssize_t i = 0; i < across; ++i)
      std::memcpy(tile + i * kPitch, source + (begin + i) * all.across.from, down * sizeof(T));
    for (py::ssize_t j = 0; j < last - first; ++j) {
      T* const row = reinterpret_cast<T*>(target + j * all.down.to) + begin;
      for (py::ssize_t i = 0; i < across; ++i) row[i] = tile[i * kPitch + j];
    }
  }
}

// The memory that an array's elements lie in.
struct Extent {
  const char *begin, *end;
};

Extent extent(const py::array& array) {
  Extent all{static_cast<const char*>(array.data()), static_cast<const char*>(array.data()) + array.itemsize()};
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    const py::ssize_t last = (array.shape(i) - 1) * array.strides(i);
    (last < 0 ? all.begin : all.end) += last;
  }
  return all;
}

// target[...] = source where that is a transposition of some size between arrays of one dtype; whether it is.
bool copy_transposed(py::handle to, py::handle from) {
  if (!is_simple(to, kStorage) || !is_simple(from, kStorage)) return false;
  auto target = py::reinterpret_borrow<py::array>(to);
  const auto source = py::reinterpret_borrow<py::array>(from);
  const py::ssize_t itemsize = target.itemsize();
  if (target.dtype().num() != source.dtype().num() || target.ndim() != source.ndim() || target.size() < kLeast ||
      !target.writeable())
    return false;
  const Extent written = extent(target), read = extent(source);
  if (written.begin < read.end && read.begin < written.end) return false;

  Transposition all{static_cast<const char*>(source.data()), static_cast<char*>(target.mutable_data()), {}, {}, {}};
  for (py::ssize_t i = 0; i < target.ndim(); ++i) {
    const Axis axis{target.shape(i), source.strides(i), target.strides(i)};
    if (source.shape(i) != axis.length) return false;
    if (axis.length == 1) continue;
    if (axis.to == itemsize && axis.from != itemsize && all.across.length == 0)
      all.across = axis;
    else if (axis.from == itemsize && axis.to != itemsize && all.down.length == 0)
      all.down = axis;
    else
      all.rest.push_back(axis);
  }
  if (all.across.length < kShortest || all.down.length < kShortest) return false;

  const py::gil_scoped_release release;
  const auto strip = itemsize == 2   ? copy_strip<std::uint16_t>
                     : itemsize == 4 ? copy_strip<std::uint32_t>
                                     : copy_strip<std::uint64_t>;
  const auto tasks = static_cast<std::size_t>(all.tasks());
  if (static_cast<std::size_t>(target.size()) < fastnorm::kSerial) {
    for (std::size_t task = 0; task < tasks; ++task) strip(all, task);
    return true;
  }
  auto one = [&](std::size_t task) { strip(all, task); };
  fastnorm::run_tasks(
      tasks, [](void* f, std::size_t task, int) { (*static_cast<decltype(one)*>(f))(task); }, &one,
      fastnorm::Order::ascending);
  return true;
}

}  // namespace

void register_copies(py::module_& m) { m.def("copy_transposed", &copy_transposed); }
