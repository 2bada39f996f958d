// The common case of small calls: arrays that need neither converting nor packing, and options of the usual types, each
// recognised in one look. Everything else, errors included, is worked out in Python.
#include <pybind11/critical_section.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "arrays.hpp"

namespace py = pybind11;

namespace {

// Axis 1 innermost in memory, the others in C order around it: (N, C, H, W) that lies as NHWC.
bool channels_last(const py::array& array) {
  py::ssize_t expected = array.itemsize();
  const auto ndim = array.ndim();
  for (py::ssize_t i = 0; i < ndim; ++i) {
    const auto axis = i == 0 ? 1 : i < ndim - 1 ? ndim - i : 0;
    if (array.shape(axis) != 1 && array.strides(axis) != expected) return false;
    expected *= array.shape(axis);
  }
  return true;
}

bool alike(const py::array& a, const py::array& b) {
  return a.dtype().char_() == b.dtype().char_() && a.ndim() == b.ndim() &&
         std::equal(a.shape(), a.shape() + a.ndim(), b.shape()) &&
         ((c_contiguous(a) && c_contiguous(b)) || std::equal(a.strides(), a.strides() + a.ndim(), b.strides()));
}

// Whether gamma and beta are each None or plain, of x's accumulation dtype and `length` elements.
bool plain_parameters(const py::array& x, py::handle gamma, py::handle beta, py::ssize_t length) {
  const char* accumulation = x.dtype().char_() == 'd' ? "d" : "f";
  for (const py::handle parameter : {gamma, beta}) {
    if (parameter.is_none()) continue;
    if (!is_plain(parameter, accumulation)) return false;
    const auto values = py::reinterpret_borrow<py::array>(parameter);
    if (values.ndim() != 1 || values.shape(0) != length) return false;
  }
  return true;
}

// Whether x is a plain array (exactly ndarray, C-contiguous, aligned, native, of a dtype that kernels store, not empty)
// and gamma and beta are each None or plain, of the accumulation dtype and shape (x.shape[axis],).
bool plain(py::handle x, py::handle gamma, py::handle beta, py::ssize_t axis) {
  if (!is_plain(x, kStorage)) return false;
  const auto array = py::reinterpret_borrow<py::array>(x);
  if (axis < 0) axis += array.ndim();
  if (axis < 0 || axis >= array.ndim() || array.size() == 0) return false;
  return plain_parameters(array, gamma, beta, array.shape(axis));
}

// The same for a backward: dout is plain, too, and of x's dtype and shape.
bool plain_backward(py::handle dout, py::handle x, py::handle gamma, py::handle beta, py::ssize_t axis) {
  return plain(x, gamma, beta, axis) && is_simple(dout, kStorage) &&
         alike(py::reinterpret_borrow<py::array>(dout), py::reinterpret_borrow<py::array>(x));
}

// (outer, channels, inner) of an x of two dimensions or more that is plain, or would be were its channels not last
// in memory; gamma and beta as for `plain`. Else None.
py::object plain_channels(py::handle x, py::handle gamma, py::handle beta, py::ssize_t axis) {
  if (!is_simple(x, kStorage)) return py::none();
  const auto array = py::reinterpret_borrow<py::array>(x);
  if (axis < 0) axis += array.ndim();
  if (axis < 0 || axis >= array.ndim() || array.ndim() < 2 || array.size() == 0) return py::none();
  const auto channels = array.shape(axis);
  if (!plain_parameters(array, gamma, beta, channels)) return py::none();
  if (c_contiguous(array)) {
    py::ssize_t outer = 1;
    for (py::ssize_t i = 0; i < axis; ++i) outer *= array.shape(i);
    return py::make_tuple(outer, channels, array.size() / (outer * channels));
  }
  if (axis == 1 && channels_last(array)) return py::make_tuple(array.size() / channels, channels, 1);
  return py::none();
}

// The same for a backward: dout lies in memory as x does.
py::object plain_channels_backward(py::handle dout, py::handle x, py::handle gamma, py::handle beta, py::ssize_t axis) {
  if (!is_simple(dout, kStorage) || !is_simple(x, kStorage) ||
      !alike(py::reinterpret_borrow<py::array>(dout), py::reinterpret_borrow<py::array>(x)))
    return py::none();
  return plain_channels(x, gamma, beta, axis);
}

// A bit for each of an array's axes that an argument names: a whole number, a tuple of them, or None, all. No value for
// what is an error, or is no int but may act as one.
std::optional<std::uint64_t> axes_in(py::handle argument, py::ssize_t ndim) {
  if (argument.is_none()) return ndim == 0 ? 0 : ~std::uint64_t{0} >> (64 - ndim);
  std::uint64_t found = 0;
  const auto add = [&](py::handle one) {
    if (!PyLong_CheckExact(one.ptr())) return false;
    int overflow = 0;
    const long long given = PyLong_AsLongLongAndOverflow(one.ptr(), &overflow), axis = given < 0 ? given + ndim : given;
    if (overflow != 0 || axis < 0 || axis >= ndim || (found >> axis & 1) != 0) return false;
    found |= std::uint64_t{1} << axis;
    return true;
  };
  if (!PyTuple_CheckExact(argument.ptr())) return add(argument) ? std::optional(found) : std::nullopt;
  for (const py::handle one : py::reinterpret_borrow<py::tuple>(argument))
    if (!add(one)) return std::nullopt;
  return found;
}

// (merged, samples, outer, channels, inner, shape of a statistic) of a dense x that is reduced along some axes, if what
// is kept lies in the order of the axes in two places at most: its axes are samples and channels, and those reduced
// lie outermost, `merged`, between them, and innermost. Else None.
py::object plain_reduction(py::handle x, py::handle axis, bool keepdims) {
  if (!is_simple(x, kStorage)) return py::none();
  const auto array = py::reinterpret_borrow<py::array>(x);
  const auto ndim = array.ndim();
  const auto reduced = axes_in(axis, ndim);
  if (!reduced || array.size() == 0) return py::none();

  // Axes longer than one, innermost in memory first.
  py::ssize_t order[64], count = 0;
  for (py::ssize_t i = ndim; i-- > 0;) {
    if (array.shape(i) == 1) continue;
    py::ssize_t at = count++;
    for (; at > 0 && array.strides(order[at - 1]) > array.strides(i); --at) order[at] = order[at - 1];
    order[at] = i;
  }
  enum { inner, channels, outer, samples, merged } part = inner;
  py::ssize_t sizes[5] = {1, 1, 1, 1, 1}, expected = array.itemsize(), kept = ndim;
  for (py::ssize_t i = 0; i < count; ++i) {
    const auto length = array.shape(order[i]);
    if (array.strides(order[i]) != expected) return py::none();
    expected *= length;
    if ((*reduced >> order[i] & 1) != 0) {
      if (part == samples) part = merged;
      if (part == channels) part = outer;
    } else {
      if (order[i] > kept || part == merged) return py::none();
      if (part == inner) part = channels;
      if (part == outer) part = samples;
      kept = order[i];
    }
    sizes[part] *= length;
  }

  py::tuple shape(keepdims ? ndim : ndim - static_cast<py::ssize_t>(__builtin_popcountll(*reduced)));
  for (py::ssize_t i = 0, at = 0; i < ndim; ++i) {
    const bool gone = (*reduced >> i & 1) != 0;
    if (keepdims || !gone) shape[at++] = gone ? 1 : array.shape(i);
  }
  return py::make_tuple(sizes[merged], sizes[samples], sizes[outer], sizes[channels], sizes[inner], shape);
}

// (outer, channels, inner) of a plain x, as `plain_channels` takes it, that is normalized with mean and var: plain, of
// float64 and one shape that broadcasts along all axes but one; gamma and beta of that shape or 1-D, or None. Else
// None.
py::object plain_normalization(py::handle x, py::handle mean, py::handle var, py::handle gamma, py::handle beta) {
  if (!is_simple(x, kStorage) || !is_plain(mean, "d") || !is_plain(var, "d")) return py::none();
  const auto array = py::reinterpret_borrow<py::array>(x), centre = py::reinterpret_borrow<py::array>(mean);
  const auto like_centre = [&](py::handle other) {
    const auto values = py::reinterpret_borrow<py::array>(other);
    return values.ndim() == centre.ndim() && std::equal(values.shape(), values.shape() + values.ndim(), centre.shape());
  };
  const auto missing = array.ndim() - centre.ndim();
  if (missing < 0 || !like_centre(var)) return py::none();
  py::ssize_t axis = 0;
  while (axis < centre.ndim() && centre.shape(axis) == 1) ++axis;
  if (axis == centre.ndim() || centre.shape(axis) != centre.size() || array.shape(missing + axis) != centre.size())
    return py::none();
  const char* accumulation = array.dtype().char_() == 'd' ? "d" : "f";
  for (const py::handle parameter : {gamma, beta}) {
    if (parameter.is_none()) continue;
    if (!is_plain(parameter, accumulation)) return py::none();
    const auto values = py::reinterpret_borrow<py::array>(parameter);
    if (!like_centre(parameter) && (values.ndim() != 1 || values.size() != centre.size())) return py::none();
  }
  return plain_channels(x, py::none(), py::none(), missing + axis);
}

// Bytes from an array's first element to its end; 0 where some lie before the first.
py::ssize_t extent(const py::array& array) {
  py::ssize_t bytes = array.itemsize();
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (array.strides(i) < 0) return 0;
    bytes += (array.shape(i) - 1) * array.strides(i);
  }
  return bytes;
}

// Whether an array of which only the extent is looked at shares no byte with `out`. What is not an exact array whose
// elements follow its first is not known to.
bool apart(const py::array& out, py::handle other) {
  if (other.is_none()) return true;
  if (PyDict_Check(other.ptr())) {  // an options dictionary with running statistics
    for (const auto& item : py::reinterpret_borrow<py::dict>(other))
      if (py::isinstance<py::array>(item.second) && !apart(out, item.second)) return false;
    return true;
  }
  if (!is_simple(other, kStorage)) return false;
  const auto array = py::reinterpret_borrow<py::array>(other);
  const auto bytes = extent(array);
  const char *begin = static_cast<const char*>(out.data()), *first = static_cast<const char*>(array.data());
  return bytes > 0 && (begin + out.nbytes() <= first || first + bytes <= begin);
}

// Whether a result like x (plain, or as `plain_channels` takes it) can be written to out: an array of the same kind,
// writable, and apart from x and the other inputs, each an array, None or a dictionary.
bool plain_out(py::handle out, py::handle x, const py::args& others) {
  if (!is_simple(out, kStorage)) return false;
  const auto array = py::reinterpret_borrow<py::array>(out);
  if (!array.writeable() || !alike(array, py::reinterpret_borrow<py::array>(x)) || !apart(array, x)) return false;
  return std::all_of(others.begin(), others.end(), [&](py::handle other) { return apart(array, other); });
}

// What options are called: the objects that Python has for these words in source code.
struct Names {
  py::handle mode, train, test, eps, momentum, running_mean, running_var;
};

const Names& names() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> found;
  const auto name = [](const char* text) { return py::handle(PyUnicode_InternFromString(text)); };
  return found
      .call_once_and_store_result([&] {
        return Names{name("mode"),     name("train"),        name("test"),       name("eps"),
                     name("momentum"), name("running_mean"), name("running_var")};
      })
      .get_stored();
}

bool is_float_in(py::handle value, double least, double most) {
  return PyFloat_CheckExact(value.ptr()) && least <= PyFloat_AS_DOUBLE(value.ptr()) &&
         PyFloat_AS_DOUBLE(value.ptr()) <= most;
}

// The options of CS231n's dictionary as the named tuple `defaults` has them, (frozen, eps, momentum, running_mean,
// running_var, ...), its own where the dictionary has none. None where it has a key that is not among these, or a value
// that is not of the common kind: running statistics are vectors of so many channels.
py::object plain_options(py::handle param, py::ssize_t channels, const py::tuple& defaults) {
  if (!PyDict_CheckExact(param.ptr())) return py::none();
  const Names& is = names();
  const auto otherwise = [&](py::ssize_t at) { return py::handle(PyTuple_GET_ITEM(defaults.ptr(), at)); };
  py::handle frozen = otherwise(0), eps = otherwise(1), momentum = otherwise(2), mean = otherwise(3),
             var = otherwise(4);
  const py::scoped_critical_section lock(param);
  for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(param)) {
    if (key.is(is.mode)) {
      if (!value.is(is.train) && !value.is(is.test)) return py::none();
      frozen = py::handle(value.is(is.test) ? Py_True : Py_False);
    } else if (key.is(is.eps)) {
      if (!is_float_in(value, 0.0, std::numeric_limits<double>::max())) return py::none();
      eps = value;
    } else if (key.is(is.momentum)) {
      if (!is_float_in(value, 0.0, 1.0)) return py::none();
      momentum = value;
    } else if (key.is(is.running_mean) || key.is(is.running_var)) {
      if (!value.is_none() && !is_vector(value, channels)) return py::none();
      (key.is(is.running_mean) ? mean : var) = value;
    } else {
      return py::none();
    }
  }
  PyTypeObject* const type = Py_TYPE(defaults.ptr());
  auto found = py::reinterpret_steal<py::object>(type->tp_alloc(type, static_cast<py::ssize_t>(defaults.size())));
  if (!found) throw py::error_already_set();
  py::ssize_t at = 0;
  for (const py::handle value : {frozen, eps, momentum, mean, var})
    PyTuple_SET_ITEM(found.ptr(), at++, value.inc_ref().ptr());
  for (; at < static_cast<py::ssize_t>(defaults.size()); ++at)
    PyTuple_SET_ITEM(found.ptr(), at, otherwise(at).inc_ref().ptr());
  return found;
}

}  // namespace

void register_plain(py::module_& m) {
  m.def("plain", &plain);
  m.def("plain_backward", &plain_backward);
  m.def("plain_channels", &plain_channels);
  m.def("plain_channels_backward", &plain_channels_backward);
  m.def("plain_reduction", &plain_reduction);
  m.def("plain_normalization", &plain_normalization);
  m.def("plain_out", &plain_out);
  m.def("plain_options", &plain_options);
}
