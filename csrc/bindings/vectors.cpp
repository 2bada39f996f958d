// Steps of small calls on the few numbers that there are by channel: the bits that NumPy gives, in a fifth of the time.
// What is not a vector (arrays.hpp) is left to NumPy: the answer is then None.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <type_traits>

#include "arrays.hpp"

namespace py = pybind11;

namespace {

// The length of a vector of float64, negative for anything else.
py::ssize_t doubles_in(py::handle object) {
  if (!is_plain(object, "d")) return -1;
  const auto array = py::reinterpret_borrow<py::array>(object);
  return array.ndim() == 1 ? array.shape(0) : -1;
}

const double* doubles(py::handle vector) {
  return static_cast<const double*>(py::reinterpret_borrow<py::array>(vector).data());
}

// Uninitialised.
template <class T>
py::array new_vector(py::ssize_t length) {
  using Api = py::detail::npy_api;
  const auto& api = Api::get();
  const Py_intptr_t shape[] = {length};
  const int type = std::is_same_v<T, double> ? Api::NPY_DOUBLE_ : Api::NPY_FLOAT_;
  PyObject* const made = api.PyArray_NewFromDescr_(api.PyArray_Type_, api.PyArray_DescrFromType_(type), 1, shape,
                                                   nullptr, nullptr, 0, nullptr);
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::array>(made);
}

// f(number, its index) of all numbers of a vector of From, as one of To. Asked for the length at each number, a
// backward of (16, 1024) took 6.6 us instead of 5.9.
template <class To, class From, class F>
py::array mapped(const py::array& vector, F f) {
  const py::ssize_t length = vector.size();
  py::array result = new_vector<To>(length);
  const auto* from = static_cast<const From*>(vector.data());
  auto* to = static_cast<To*>(result.mutable_data());
  for (py::ssize_t i = 0; i < length; ++i) to[i] = static_cast<To>(f(static_cast<double>(from[i]), i));
  return result;
}

// The same of a vector of either dtype, as one of its own dtype.
template <class F>
py::array mapped_alike(py::handle object, F f) {
  const auto vector = py::reinterpret_borrow<py::array>(object);
  return vector.dtype().char_() == 'd' ? mapped<double, double>(vector, f) : mapped<float, float>(vector, f);
}

// A copy as float64.
py::array widened(py::handle object) {
  const auto same = [](double number, py::ssize_t) { return number; };
  const auto vector = py::reinterpret_borrow<py::array>(object);
  return vector.dtype().char_() == 'd' ? mapped<double, double>(vector, same) : mapped<double, float>(vector, same);
}

// Two vectors of float64, uninitialised.
py::tuple pair(py::ssize_t length) { return py::make_tuple(new_vector<double>(length), new_vector<double>(length)); }

// Running statistics as float64, copied, if they are vectors of so many numbers.
py::object constants(py::handle mean, py::handle var, py::ssize_t length) {
  if (!is_vector(mean, length) || !is_vector(var, length)) return py::none();
  return py::make_tuple(widened(mean), widened(var));
}

// momentum * running + (1 - momentum) * batch, computed in float64, as new vectors of the dtypes of the running ones.
// Those of the batch are of float64; its var counts `correction` times.
py::object running_averages(py::handle running_mean, py::handle running_var, py::handle mean, py::handle var,
                            double momentum, double correction) {
  const auto length = doubles_in(mean);
  if (length < 0 || doubles_in(var) != length || !is_vector(running_mean, length) || !is_vector(running_var, length))
    return py::none();
  const auto average = [momentum](py::handle running, const double* batch, double factor) {
    return mapped_alike(
        running, [=](double old, py::ssize_t i) { return old * momentum + (1.0 - momentum) * (batch[i] * factor); });
  };
  return py::make_tuple(average(running_mean, doubles(mean), 1.0), average(running_var, doubles(var), correction));
}

// Sums of float64 as the gradients of gamma and beta: new vectors of the dtypes of these, None for what is None.
py::object gradients(py::handle sum_dy_xhat, py::handle sum_dy, py::handle gamma, py::handle beta) {
  const auto fits = [](py::handle sum, py::handle parameter) {
    if (parameter.is_none()) return true;
    const auto length = doubles_in(sum);
    return length >= 0 && is_vector(parameter, length);
  };
  if (!fits(sum_dy_xhat, gamma) || !fits(sum_dy, beta)) return py::none();
  const auto gradient = [](py::handle sum, py::handle parameter) -> py::object {
    if (parameter.is_none()) return py::none();
    return mapped_alike(parameter, [from = doubles(sum)](double, py::ssize_t i) { return from[i]; });
  };
  return py::make_tuple(gradient(sum_dy_xhat, gamma), gradient(sum_dy, beta));
}

}  // namespace

void register_vectors(py::module_& m) {
  m.def("pair", &pair);
  m.def("constants", &constants);
  m.def("running_averages", &running_averages);
  m.def("gradients", &gradients);
}
