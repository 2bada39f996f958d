// The common case of small calls: arrays that need neither converting nor packing, recognised in one look, and the
// running statistics in one step. Everything else, errors included, is worked out in Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>

namespace py = pybind11;

namespace {

bool is_plain(py::handle object, const char* dtypes) {
  auto& api = py::detail::npy_api::get();
  constexpr int kWanted = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(api.PyArray_Type_)) return false;
  const auto array = py::reinterpret_borrow<py::array>(object);
  const auto dtype = array.dtype();
  return (array.flags() & kWanted) == kWanted && std::strchr(dtypes, dtype.char_()) != nullptr &&
         (dtype.byteorder() == '=' || dtype.byteorder() == '|');
}

bool alike(const py::array& a, const py::array& b) {
  return a.dtype().char_() == b.dtype().char_() && a.ndim() == b.ndim() &&
         std::equal(a.shape(), a.shape() + a.ndim(), b.shape());
}

// Whether x is a plain array (exactly ndarray, C-contiguous, aligned, native float16, float32 or float64, not
// empty) and gamma and beta are each None or plain, of the accumulation dtype and shape (x.shape[axis],).
bool plain(py::handle x, py::handle gamma, py::handle beta, Py_ssize_t axis) {
  if (!is_plain(x, "efd")) return false;
  const auto array = py::reinterpret_borrow<py::array>(x);
  if (axis < 0) axis += array.ndim();
  if (axis < 0 || axis >= array.ndim() || array.size() == 0) return false;
  const char* accumulation = array.dtype().char_() == 'd' ? "d" : "f";
  for (const py::handle parameter : {gamma, beta}) {
    if (parameter.is_none()) continue;
    if (!is_plain(parameter, accumulation)) return false;
    const auto values = py::reinterpret_borrow<py::array>(parameter);
    if (values.ndim() != 1 || values.shape(0) != array.shape(axis)) return false;
  }
  return true;
}

// The same for a backward: dout is plain, too, and of x's dtype and shape.
bool plain_backward(py::handle dout, py::handle x, py::handle gamma, py::handle beta, Py_ssize_t axis) {
  return plain(x, gamma, beta, axis) && is_plain(dout, "efd") &&
         alike(py::reinterpret_borrow<py::array>(dout), py::reinterpret_borrow<py::array>(x));
}

// Whether an array of which only the extent is looked at shares no byte with `out`. What is not an exact, contiguous
// array is not known to.
bool apart(const py::array& out, py::handle other) {
  if (other.is_none()) return true;
  if (PyDict_Check(other.ptr())) {  // an options dictionary with running statistics
    for (const auto& item : py::reinterpret_borrow<py::dict>(other))
      if (py::isinstance<py::array>(item.second) && !apart(out, item.second)) return false;
    return true;
  }
  if (!is_plain(other, "efd")) return false;
  const auto array = py::reinterpret_borrow<py::array>(other);
  const char *begin = static_cast<const char*>(out.data()), *first = static_cast<const char*>(array.data());
  return begin + out.nbytes() <= first || first + array.nbytes() <= begin;
}

// Whether a result like x (plain) can be written to out: plain, writable, of x's dtype and shape, and apart from x
// and the other inputs, each an array, None or a dictionary.
bool plain_out(py::handle out, py::handle x, const py::args& others) {
  if (!is_plain(out, "efd")) return false;
  const auto array = py::reinterpret_borrow<py::array>(out);
  if (!array.writeable() || !alike(array, py::reinterpret_borrow<py::array>(x)) || !apart(array, x)) return false;
  return std::all_of(others.begin(), others.end(), [&](py::handle other) { return apart(array, other); });
}

template <class T>
py::array mixed(const py::array& running, const double* batch, double momentum) {
  py::array_t<T> result(running.size());
  const T* from = static_cast<const T*>(running.data());
  T* to = result.mutable_data();
  for (py::ssize_t i = 0; i < running.size(); ++i)
    to[i] = static_cast<T>(static_cast<double>(from[i]) * momentum + (1.0 - momentum) * batch[i]);
  return result;
}

// momentum * running + (1 - momentum) * batch in float64, as a new array of running's dtype; None unless running is
// plain, 1-D, of float32 or float64, and batch of float64 and the same length.
py::object running_average(py::handle running, py::handle batch, double momentum) {
  if (!is_plain(running, "fd") || !is_plain(batch, "d")) return py::none();
  const auto old = py::reinterpret_borrow<py::array>(running), values = py::reinterpret_borrow<py::array>(batch);
  if (old.ndim() != 1 || values.ndim() != 1 || old.size() != values.size()) return py::none();
  const auto* from = static_cast<const double*>(values.data());
  if (old.dtype().char_() == 'd') return mixed<double>(old, from, momentum);
  return mixed<float>(old, from, momentum);
}

}  // namespace

void register_plain(py::module_& m) {
  m.def("plain", &plain);
  m.def("plain_backward", &plain_backward);
  m.def("plain_out", &plain_out);
  m.def("running_average", &running_average);
}
