// Outputs as ordinary NumPy arrays that own their data, in blocks of the pool.
//
// NumPy has each array's memory handler free it (NEP 49), so the pool gets a block back when the last view, memoryview
// or exported tensor of it is gone. tracemalloc, ndarray.resize and sys.getsizeof work as ever, which they would not
// with a base object.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <vector>

#include "fastnorm/plan.hpp"
#include "fastnorm/pool.hpp"

namespace py = pybind11;

namespace {

using std::size_t;

// Declared by hand, as pybind11 does, so that a build needs no NumPy: this struct and the places in the table are part
// of NumPy's binary interface, the same from 1.22 to 2.x.
struct Handler {
  char name[127];
  std::uint8_t version;
  void* context;
  void* (*malloc)(void* context, size_t size);
  void* (*calloc)(void* context, size_t count, size_t size);
  void* (*realloc)(void* context, void* address, size_t size);
  void (*free)(void* context, void* address, size_t size);
};

struct NumPy {
  PyObject* (*new_like_array)(PyObject* prototype, int order, PyObject* dtype, int subok);
  PyObject* (*set_handler)(PyObject* handler);
  PyObject* (*get_handler)();
  PyObject* default_handler;
  PyObject* our_handler;
};

static_assert(offsetof(Handler, context) == 128);

constexpr int kKeepOrder = 2;
constexpr char kCapsuleName[] = "mem_handler";

// How far into a line the next output of this thread is to begin.
thread_local size_t begun = 0;

Handler handler = {
    "fastnorm",
    1,
    nullptr,
    [](void*, size_t size) { return fastnorm::pool_allocate(size, begun); },
    [](void*, size_t count, size_t size) { return std::calloc(count, size); },
    [](void*, void* address, size_t size) { return fastnorm::pool_reallocate(address, size); },
    [](void*, void* address, size_t) { fastnorm::pool_free(address); },
};

NumPy find_numpy() {
  const auto module = py::detail::import_numpy_core_submodule("multiarray");
  const auto table = module.attr("_ARRAY_API").cast<py::capsule>();
  void** const api = table.get_pointer<void*>();
  NumPy found{};
  found.new_like_array = reinterpret_cast<decltype(found.new_like_array)>(api[277]);
  found.set_handler = reinterpret_cast<decltype(found.set_handler)>(api[304]);
  found.get_handler = reinterpret_cast<decltype(found.get_handler)>(api[305]);
  found.default_handler = *static_cast<PyObject**>(api[306]);
  found.our_handler = PyCapsule_New(&handler, kCapsuleName, nullptr);
  if (found.our_handler == nullptr) throw py::error_already_set();
  return found;
}

const NumPy& numpy() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<NumPy> found;
  return found.call_once_and_store_result(find_numpy).get_stored();
}

// While it lives, arrays that this thread makes take their memory from the pool. A handler of the user's own stays.
class FromPool {
 public:
  explicit FromPool(size_t begun_at) {
    begun = begun_at;
    const auto current = py::reinterpret_steal<py::object>(numpy().get_handler());
    if (current.ptr() != numpy().default_handler) return;
    previous_ = set(numpy().our_handler);
    if (!previous_) throw py::error_already_set();
  }
  ~FromPool() {
    if (previous_) set(previous_.ptr());
  }
  FromPool(const FromPool&) = delete;
  FromPool& operator=(const FromPool&) = delete;

 private:
  static py::object set(PyObject* wanted) { return py::reinterpret_steal<py::object>(numpy().set_handler(wanted)); }

  py::object previous_;
};

// numpy.empty(shape, dtype)
py::array empty(const std::vector<py::ssize_t>& shape, const py::dtype& dtype) {
  size_t bytes = static_cast<size_t>(dtype.itemsize());
  for (const auto length : shape) bytes *= static_cast<size_t>(length);
  std::optional<FromPool> scope;
  if (fastnorm::pooled(bytes)) scope.emplace(0);
  return py::array(dtype, shape);
}

// numpy.empty_like(prototype, dtype, subok=False), which begins as far into a line as the prototype does, if it fits a
// cache: vectors of both are then aligned. NumPy's large arrays begin 16 bytes after a page. Two threads, us, output
// where a line begins and like this: LayerNorm (1024, 1024) forward 51.9 and 46.5, backward 102 and 93, GroupNorm (16,
// 512, 14, 14) backward 169 and 150; but past the cache BatchNorm (64, 512, 28, 28) backward 6860 and 7040.
py::object empty_like(const py::array& prototype, const std::optional<py::dtype>& dtype) {
  const auto itemsize = dtype ? dtype->itemsize() : prototype.itemsize();
  std::optional<FromPool> scope;
  const size_t bytes = static_cast<size_t>(prototype.size() * itemsize);
  if (fastnorm::pooled(bytes))
    scope.emplace(fastnorm::streams(bytes, 2) ? 0 : reinterpret_cast<size_t>(prototype.data()));
  PyObject* const wanted = dtype ? dtype->inc_ref().ptr() : nullptr;  // new_like_array takes the reference
  PyObject* const made = numpy().new_like_array(prototype.ptr(), kKeepOrder, wanted, 0);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

}  // namespace

void register_memory(py::module_& m) {
  m.def("empty", &empty);
  m.def("empty_like", &empty_like, py::arg("prototype"), py::arg("dtype") = py::none());
  m.def("output_pool", [] {
    const auto state = fastnorm::pool_state();
    return py::make_tuple(state.limit, state.held, state.blocks, state.hits, state.misses);
  });
  m.def("set_output_pool", &fastnorm::set_pool_limit, py::call_guard<py::gil_scoped_release>());
  m.def("clear_output_pool", &fastnorm::clear_pool, py::call_guard<py::gil_scoped_release>());
}
