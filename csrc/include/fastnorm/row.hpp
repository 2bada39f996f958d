// The row family: statistics of each row of (rows, cols), gamma and beta by column.
//
//   scalar:  y[r][k]   = (x[r][k] - mean[r])*rstd[r]*gamma[k] + beta[k]
//            dx[r][k]  = rstd[r]*(g - mean(g) - xhat*mean(g*xhat)),  g = dy*gamma
//            dgamma[k] = sum over r of dy*xhat,  dbeta[k] = sum over r of dy
//
// A row's statistics are those of a channel of (1, rows, cols); only the affine map differs. Where `mean` is null, rows
// are not centred: mean and mean(g) count as 0, and var is the mean of squares.
#pragma once

#include "fastnorm/channel.hpp"

namespace fastnorm::FASTNORM_LEVEL {

// A parameter by column; an absent one is a constant vector read again and again, so no loop has variants. Passed by
// value: through a reference both words are read again after every store, and what a row computes took 1.4 times as
// long.
template <class A>
struct ByColumn {
  const A* values;
  size_t mask;
  const A* at(size_t k) const { return values + (k & mask); }
};

template <class A>
struct Parameter : ByColumn<A> {
  alignas(kVectorBytes) A constant[kLanes<A>];

  Parameter(const void* given, A otherwise) : ByColumn<A>{static_cast<const A*>(given), ~size_t{0}} {
    if (given == nullptr) {
      std::fill_n(constant, kLanes<A>, otherwise);
      this->values = constant;
      this->mask = 0;
    }
  }
  Parameter(const Parameter&) = delete;
  Parameter& operator=(const Parameter&) = delete;
};

template <class T>
struct Row {
  using A = Acc<T>;
  // Bytes of rows that are measured, then written together: they should still be in a first-level cache.
  static constexpr size_t kTogetherBytes = size_t{32} << 10;

  // `begun_at` of a row where it is that of all rows, else 0.
  FASTNORM_INLINE static size_t begun_in_rows(const T* p, size_t cols) {
    return cols * sizeof(T) % kLineBytes == 0 ? begun_at(p, cols) : 0;
  }

  // ---- forward ----

  // xhat = (x - centre)*scale + shift along a row.
  struct Affine {
    Vector<A> centre, scale, shift;
    FASTNORM_INLINE Vector<A> xhat(Vector<A> x) const { return mul_add(x - centre, scale, shift); }
  };

  FASTNORM_INLINE static Affine affine(double mean, double var, double eps) {
    const double rstd = rstd_of(var, eps);
    const A near = static_cast<A>(mean);
    return {broadcast(near), broadcast(static_cast<A>(rstd)),
            broadcast(static_cast<A>(-(mean - static_cast<double>(near)) * rstd))};
  }

  FASTNORM_INLINE static void apply(Writer<T>& writer, const T* x, T* y, size_t k0, size_t k1, double mean, double var,
                                    double eps, ByColumn<A> gamma, ByColumn<A> beta, size_t ahead) {
    const Affine row = affine(mean, var, eps);
    writer.run(y + k0, k1 - k0, Ahead<T, 1>{{x + k0}, ahead}, [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA {
      return mul_add(row.xhat(how.load(x + k0 + i)), how.load(gamma.at(k0 + i)), how.load(beta.at(k0 + i)));
    });
  }

  // kSweep rows through the cache, which read gamma and beta once for all of them.
  FASTNORM_INLINE static void apply_together(const T* x, T* y, size_t cols, const double* mean, const double* var,
                                             double eps, ByColumn<A> gamma, ByColumn<A> beta) {
    Affine rows[kSweep];
    repeat<kSweep>([&](auto r) FASTNORM_INLINE_LAMBDA { rows[r] = affine(mean ? mean[r] : 0.0, var[r], eps); });
    for_vectors<A>(cols, begun_in_rows(y, cols), [&](size_t k, auto how) FASTNORM_INLINE_LAMBDA {
      const Vector<A> scale = how.load(gamma.at(k)), shift = how.load(beta.at(k));
      repeat<kSweep>([&](auto r) FASTNORM_INLINE_LAMBDA {
        put(y + r * cols + k, mul_add(rows[r].xhat(how.load(x + r * cols + k)), scale, shift), how);
      });
    });
  }

  static void forward(const T* x, RowShape shape, const void* gamma_given, const void* beta_given, double eps, T* y,
                      double* mean, double* var) {
    const Parameter<A> gamma(gamma_given, A{1}), beta(beta_given, A{0});
    const ChannelShape as_channels{1, shape.rows, shape.cols};
    const Runs<T> runs{as_channels, cut_channels(as_channels)};
    const size_t groups = runs.cut.groups;
    const RowPlan plan = plan_rows(shape, sizeof(T), 1, num_threads());

    const bool centred = mean != nullptr;
    const auto keep = [&](size_t row, const Moments& m) {
      if (centred) mean[row] = m.mean;
      var[row] = variance(m);
    };

    if (plan.team) {
      const Workspace<Moments> partial(groups);
      const size_t per_group = runs.cut.per_group * runs.cut.piece;
      for (size_t row = 0; row < shape.rows; ++row) {
        parallel_for(groups, [&](size_t g, int) { partial.data()[g] = runs.group_moments(x, g, row, centred); });
        Moments m{};
        for (size_t g = 0; g < groups; ++g) m = merge(m, partial.data()[g]);
        keep(row, m);
        const auto write = [&](size_t g, int) {
          const size_t k0 = g * per_group;
          Writer<T> writer(plan.stream);
          apply(writer, x + row * shape.cols, y + row * shape.cols, k0, std::min(shape.cols, k0 + per_group), m.mean,
                var[row], eps, gamma, beta, row + 1 < shape.rows ? plan.ahead : kReadAhead);
        };
        parallel_for(groups, write, Order::descending);
      }
      return;
    }
    over_rows(shape, plan, [&](size_t first, size_t last) {
      Writer<T> writer(plan.stream);
      if (runs.cut.units == 1) {
        short_rows_forward(writer, x, shape.cols, first, last, plan, gamma, beta, eps, y, mean, var);
        return;
      }
      for (size_t row = first; row < last; ++row) {
        Moments m{};
        for (size_t g = 0; g < groups; ++g) m = merge(m, runs.group_moments(x, g, row, centred));
        keep(row, m);
        apply(writer, x + row * shape.cols, y + row * shape.cols, 0, shape.cols, m.mean, var[row], eps, gamma, beta,
              row + 1 < last ? plan.ahead : kReadAhead);
      }
    });
  }

  // Rows of one block each. The sum of a vector's lanes, a division, a square root are each a long wait: a row's
  // moments are taken while rows before it are still to be written.
  static void short_rows_forward(Writer<T>& writer, const T* x, size_t cols, size_t first, size_t last,
                                 const RowPlan& plan, ByColumn<A> gamma, ByColumn<A> beta, double eps, T* y,
                                 double* mean, double* var) {
    const auto measure = [&](size_t row) FASTNORM_INLINE_LAMBDA {
      const T* from = x + row * cols;
      if (mean == nullptr) {
        var[row] = variance(block_squares(from, cols));
        return;
      }
      const Moments m = block_moments(from, 1, cols, cols);
      mean[row] = m.mean;
      var[row] = variance(m);
    };
    const auto measure_some = [&](size_t row, size_t end) FASTNORM_INLINE_LAMBDA {
      if (mean != nullptr && cols <= kFourRows)
        for (; row + 4 <= end; row += 4) {
          Moments found[4];
          four_moments(x + row * cols, cols, found);
          for (size_t k = 0; k < 4; ++k) {
            mean[row + k] = found[k].mean;
            var[row + k] = variance(found[k]);
          }
        }
      for (; row < end; ++row) measure(row);
    };
    if (!plan.stream && kSweep * cols * sizeof(T) <= kTogetherBytes)
      for (; first + kSweep <= last; first += kSweep) {
        measure_some(first, first + kSweep);
        apply_together(x + first * cols, y + first * cols, cols, mean ? mean + first : nullptr, var + first, eps, gamma,
                       beta);
      }
    const size_t step = cols <= kFourRows ? 4 : 1;
    size_t measured = std::min(last, first + plan.before);
    measure_some(first, measured);
    for (size_t row = first; row < last;) {
      const size_t more = std::min(last, measured + step);
      measure_some(measured, more);
      measured = more;
      for (const size_t end = std::min(last, row + step); row < end; ++row)
        apply(writer, x + row * cols, y + row * cols, 0, cols, mean ? mean[row] : 0.0, var[row], eps, gamma, beta,
              row * cols + plan.ahead < last * cols ? plan.ahead : kReadAhead);
    }
  }

  // task(first, last) for blocks of rows, in parallel.
  template <class F>
  static void over_rows(RowShape shape, const RowPlan& plan, F task) {
    const auto run = [&](size_t i, int) { task(i * plan.task, std::min(shape.rows, (i + 1) * plan.task)); };
    const size_t count = (shape.rows + plan.task - 1) / plan.task;
    if (plan.serial)
      SerialLoop{0}(count, run);
    else
      parallel_for(count, run);
  }

  // ---- backward ----

  // What the passes need of a row; mean = centre + rest.
  struct Known {
    A centre, rstd, shift;  // xhat = (x - centre)*rstd + shift
    double exact_rstd, rest;
  };

  static Known known(double mean, double var, double eps) {
    const double rstd = rstd_of(var, eps);
    const A centre = static_cast<A>(mean);
    const double rest = mean - static_cast<double>(centre);
    return {centre, static_cast<A>(rstd), static_cast<A>(-rest * rstd), rstd, rest};
  }

  // sum(g) and sum(g*(x - centre)) along a row
  struct Sums {
    double g, gx;
  };

  // Adds a vector of a row, dy and x, to its sums and to the column sums.
  FASTNORM_INLINE static void add(Vector<A> grad, Vector<A> value, const Known& row, Vector<A> scale, Vector<A>& g_sum,
                                  Vector<A>& gx_sum, Vector<A>& gamma_sum, Vector<A>& beta_sum) {
    const Vector<A> centred = value - broadcast(row.centre),
                    xhat = mul_add(centred, broadcast(row.rstd), broadcast(row.shift)), g = grad * scale;
    beta_sum += grad;
    gamma_sum = mul_add(grad, xhat, gamma_sum);
    g_sum += g;
    gx_sum = mul_add(g, centred, gx_sum);
  }

  // Column sums of a task, whole vectors: [k] is that of column k, `begun` lanes into a vector.
  struct ColumnSums {
    A *gamma, *beta;

    template <class How, class F>
    FASTNORM_INLINE void update(size_t k, How how, const F& f) const {
      const Vector<A> gamma_before = load(gamma + k - how.skip), beta_before = load(beta + k - how.skip);
      Vector<A> gamma_sum = gamma_before, beta_sum = beta_before;
      f(gamma_sum, beta_sum);
      store(gamma + k - how.skip, how.pick(gamma_sum, gamma_before));
      store(beta + k - how.skip, how.pick(beta_sum, beta_before));
    }
  };

  // Sweeps columns [k0, k1) of `n` rows (at most kSweep): adds each row's sums, and the rows' dy*xhat and dy
  // to the column sums.
  template <size_t n>
  FASTNORM_INLINE static void sweep(const T* dy, const T* x, size_t cols, size_t k0, size_t k1, size_t begun,
                                    const Known* rows, ByColumn<A> gamma, Sums* sums, ColumnSums columns) {
    for (size_t start = k0; start < k1; start += kChunk) {
      Vector<A> g_sum[n] = {}, gx_sum[n] = {};
      for_vectors<A>(std::min(kChunk, k1 - start), begun, [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA {
        const size_t k = start + i;
        const Vector<A> scale = how.load(gamma.at(k));
        columns.update(k - k0, how, [&](Vector<A>& gamma_sum, Vector<A>& beta_sum) FASTNORM_INLINE_LAMBDA {
          for (size_t r = 0; r < n; ++r)
            add(how.load(dy + r * cols + k), how.load(x + r * cols + k, broadcast(rows[r].centre)), rows[r], scale,
                g_sum[r], gx_sum[r], gamma_sum, beta_sum);
        });
      });
      for (size_t r = 0; r < n; ++r) {
        sums[r].g += total<A>(g_sum[r]);
        sums[r].gx += total<A>(gx_sum[r]);
      }
    }
  }

  // The rows of `sweep` by number: whole sweeps, then the rest one at a time.
  static size_t sweep_rows(const T* dy, const T* x, size_t cols, size_t left, size_t k0, size_t k1, size_t begun,
                           const Known* rows, ByColumn<A> gamma, Sums* sums, ColumnSums columns) {
    if (left >= kSweep) {
      sweep<kSweep>(dy, x, cols, k0, k1, begun, rows, gamma, sums, columns);
      return kSweep;
    }
    sweep<1>(dy, x, cols, k0, k1, begun, rows, gamma, sums, columns);
    return 1;
  }

  // dx = scale*((x - centre)*descent + (g - offset)) along a row.
  struct Descent {
    Vector<A> centre, scale, descent, offset;
    FASTNORM_INLINE Vector<A> dx(Vector<A> g, Vector<A> x) const {
      return scale * mul_add(x - centre, descent, g - offset);
    }
  };

  FASTNORM_INLINE static Descent descent(const Known& row, const Sums& sums, size_t cols) {
    const double n = static_cast<double>(cols);
    const double slope = row.exact_rstd * row.exact_rstd * (sums.gx - row.rest * sums.g) / n;
    return {broadcast(row.centre), broadcast(row.rstd), broadcast(static_cast<A>(-slope)),
            broadcast(static_cast<A>(sums.g / n - row.rest * slope))};
  }

  FASTNORM_INLINE static void write_dx(Writer<T>& writer, const T* dy, const T* x, T* dx, size_t k0, size_t k1,
                                       const Descent& form, ByColumn<A> gamma, size_t ahead) {
    writer.run(dx + k0, k1 - k0, Ahead<T, 2>{{dy + k0, x + k0}, ahead}, [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA {
      const Vector<A> g = how.load(dy + k0 + i) * how.load(gamma.at(k0 + i));
      return form.dx(g, how.load(x + k0 + i));
    });
  }

  // Two rows through the cache, which read gamma once for both.
  FASTNORM_INLINE static void write_pair(const T* dy, const T* x, T* dx, size_t cols, const Known* rows,
                                         const Sums* sums, ByColumn<A> gamma) {
    const Descent forms[2] = {descent(rows[0], sums[0], cols), descent(rows[1], sums[1], cols)};
    for_vectors<A>(cols, begun_in_rows(dx, cols), [&](size_t k, auto how) FASTNORM_INLINE_LAMBDA {
      const Vector<A> scale = how.load(gamma.at(k));
      repeat<2>([&](auto r) FASTNORM_INLINE_LAMBDA {
        const size_t i = r * cols + k;
        put(dx + i, forms[r].dx(how.load(dy + i) * scale, how.load(x + i)), how);
      });
    });
  }

  // Writes dx of a row past the cache, and meanwhile adds up the sums of the next one, a vector for each that is
  // stored: two arrays come from memory fastest when they are read in order, in step with the stores. Each of their
  // lines has to be fetched ahead: one a row left out, which it shares with the next, is waited for. Asking for the end
  // of a chunk where a row is one made float16 a tenth slower.
  template <bool one_chunk>
  FASTNORM_INLINE static Sums write_and_sum(Writer<T>& writer, const T* dy, const T* x, T* dx, size_t cols,
                                            const Descent& form, const Known& next, ByColumn<A> gamma,
                                            ColumnSums columns, size_t ahead) {
    constexpr size_t lanes = kLanes<A>;
    const T *next_dy = dy + cols, *next_x = x + cols;
    const Ahead<T, 1> fetch_dy{{next_dy}, ahead}, fetch_x{{next_x}, ahead};
    Sums sums{};
    Vector<A> g_sum{}, gx_sum{};
    const auto end_chunk = [&] FASTNORM_INLINE_LAMBDA {
      sums.g += total<A>(g_sum);
      sums.gx += total<A>(gx_sum);
      g_sum = gx_sum = Vector<A>{};
    };
    size_t summed = 0;
    const auto sum = [&](auto how, Vector<A> grad, Vector<A> value) FASTNORM_INLINE_LAMBDA {
      if (summed * sizeof(T) % kLineBytes == 0) {
        fetch_dy.line(summed);
        fetch_x.line(summed);
      }
      columns.update(summed, how, [&](Vector<A>& gamma_sum, Vector<A>& beta_sum) FASTNORM_INLINE_LAMBDA {
        add(grad, value, next, how.load(gamma.at(summed)), g_sum, gx_sum, gamma_sum, beta_sum);
      });
      summed += lanes;
      if (!one_chunk && summed % kChunk == 0) end_chunk();
    };
    AlignedReader<T> grads(next_dy), values(next_x);
    writer.run(dx, cols, Ahead<T, 2>{}, [&](size_t k, auto how) FASTNORM_INLINE_LAMBDA {
      if constexpr (std::is_same_v<decltype(how), Whole>)
        if (summed + lanes + AlignedReader<T>::kBeyond <= cols) sum(how, grads.next(), values.next());
      return form.dx(how.load(dy + k) * how.load(gamma.at(k)), how.load(x + k));
    });
    for_columns<A>(cols - summed, [&, from = summed](size_t i, auto how) FASTNORM_INLINE_LAMBDA {
      const size_t k = from + i;
      sum(how, how.load(next_dy + k), how.load(next_x + k, broadcast(next.centre)));
    });
    end_chunk();
    return sums;
  }

  // A task of short rows past the cache.
  static void streamed_rows(const T* dy, const T* x, size_t cols, size_t first, size_t last, const double* mean,
                            const double* var, double eps, ByColumn<A> gamma, T* dx, ColumnSums columns, size_t ahead) {
    const auto known_of = [&](size_t r) FASTNORM_INLINE_LAMBDA { return known(mean ? mean[r] : 0.0, var[r], eps); };
    const auto form_of = [&](const Known& row, const Sums& sums)
                             FASTNORM_INLINE_LAMBDA { return descent(row, {mean ? sums.g : 0.0, sums.gx}, cols); };
    size_t at = first * cols;
    Known row = known_of(first);
    Sums sums{};
    sweep<1>(dy + at, x + at, cols, 0, cols, 0, &row, gamma, &sums, columns);
    Writer<T> writer(true);
    for (size_t r = first + 1; r < last; ++r, at += cols) {
      const Descent form = form_of(row, sums);
      row = known_of(r);
      const auto step = [&](auto one_chunk) FASTNORM_INLINE_LAMBDA {
        return write_and_sum<one_chunk>(writer, dy + at, x + at, dx + at, cols, form, row, gamma, columns, ahead);
      };
      sums = cols <= kChunk ? step(std::true_type{}) : step(std::false_type{});
    }
    write_dx(writer, dy + at, x + at, dx + at, 0, cols, form_of(row, sums), gamma, 0);
  }

  // Rows that fit a core's cache: a task takes some rows and keeps column sums of its own.
  static void short_rows(const T* dy, const T* x, RowShape shape, const double* mean, const double* var, double eps,
                         ByColumn<A> gamma, T* dx, double* dgamma, double* dbeta, const RowPlan& plan) {
    const size_t cols = shape.cols;
    const size_t tasks = (shape.rows + plan.task - 1) / plan.task;
    // What is swept from beyond the cache gains nothing by being aligned.
    const size_t begun = plan.stream ? 0 : begun_in_rows(x, cols);
    const size_t pitch = (begun + cols + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    const Workspace<A> sums(2 * tasks * pitch);
    const auto one = [&](size_t task, int) {
      std::fill_n(sums.data() + 2 * task * pitch, 2 * pitch, A{});
      const ColumnSums columns{sums.data() + 2 * task * pitch + begun, sums.data() + (2 * task + 1) * pitch + begun};
      const size_t last = std::min(shape.rows, (task + 1) * plan.task);
      if (plan.before > 0) {
        streamed_rows(dy, x, cols, task * plan.task, last, mean, var, eps, gamma, dx, columns, plan.ahead);
        return;
      }
      Writer<T> writer(plan.stream);
      for (size_t row = task * plan.task; row < last;) {
        Known rows[kSweep];
        Sums along[kSweep] = {};
        const size_t left = last - row;
        for (size_t r = 0; r < std::min(kSweep, left); ++r)
          rows[r] = known(mean ? mean[row + r] : 0.0, var[row + r], eps);
        const size_t at = row * cols;
        const size_t done = sweep_rows(dy + at, x + at, cols, left, 0, cols, begun, rows, gamma, along, columns);
        if (mean == nullptr)
          for (Sums& sum : along) sum.g = 0;
        size_t r = 0;
        if (!plan.stream)
          for (; r + 2 <= done; r += 2)
            write_pair(dy + at + r * cols, x + at + r * cols, dx + at + r * cols, cols, rows + r, along + r, gamma);
        const size_t ahead = row + done < last ? plan.ahead : kReadAhead;
        for (; r < done; ++r) {
          const size_t here = at + r * cols;
          write_dx(writer, dy + here, x + here, dx + here, 0, cols, descent(rows[r], along[r], cols), gamma, ahead);
        }
        row += done;
      }
    };
    const auto finish = [&](size_t strip, int) {
      const size_t k0 = strip * kStrip, n = std::min(kStrip, cols - k0);
      double gamma_total[kStrip] = {}, beta_total[kStrip] = {};
      for (size_t task = 0; task < tasks; ++task) {
        const A *gamma_sum = sums.data() + 2 * task * pitch + begun + k0, *beta_sum = gamma_sum + pitch;
        for (size_t k = 0; k < n; ++k) {
          gamma_total[k] += static_cast<double>(gamma_sum[k]);
          beta_total[k] += static_cast<double>(beta_sum[k]);
        }
      }
      std::copy_n(gamma_total, n, dgamma + k0);
      std::copy_n(beta_total, n, dbeta + k0);
    };
    const size_t strips = dgamma == nullptr ? 0 : (cols + kStrip - 1) / kStrip;
    if (plan.serial) {
      SerialLoop{0}(tasks, one);
      SerialLoop{0}(strips, finish);
    } else {
      together([&](auto loop) {
        loop(tasks, one);
        loop(strips, finish);
      });
    }
  }

  // Long rows: all threads on a block of rows, first the sums along the rows, then dx, piece by piece.
  // Column sums need no partial copies, since a piece's columns belong to one task.
  static void long_rows(const T* dy, const T* x, RowShape shape, const double* mean, const double* var, double eps,
                        ByColumn<A> gamma, T* dx, double* dgamma, double* dbeta, const RowPlan& plan) {
    const size_t cols = shape.cols;
    const size_t pieces = (cols + kChunk - 1) / kChunk;
    const Workspace<Sums> partial(plan.rows * pieces);
    const Workspace<Known> rows(plan.rows);
    const Workspace<Sums> along(plan.rows);
    const size_t begun = plan.stream ? 0 : begun_in_rows(x, cols), pitch = kChunk + kLanes<A>;
    const Workspace<A> sums(2 * pieces * pitch);
    std::fill_n(sums.data(), 2 * pieces * pitch, A{});
    if (dgamma != nullptr) {
      std::fill_n(dgamma, cols, 0.0);
      std::fill_n(dbeta, cols, 0.0);
    }
    size_t summed = 0;  // rows in gamma_sums and beta_sums
    for (size_t first = 0; first < shape.rows; first += plan.rows) {
      const size_t n = std::min(plan.rows, shape.rows - first);
      for (size_t r = 0; r < n; ++r) rows.data()[r] = known(mean ? mean[first + r] : 0.0, var[first + r], eps);
      summed += n;
      const bool full = summed >= kTaskRows || first + n == shape.rows;
      parallel_for(pieces, [&](size_t piece, int) {
        const size_t k0 = piece * kChunk, k1 = std::min(cols, k0 + kChunk);
        const ColumnSums columns{sums.data() + 2 * piece * pitch + begun,
                                 sums.data() + (2 * piece + 1) * pitch + begun};
        for (size_t r = 0; r < n;) {
          Sums sums_of_piece[kSweep] = {};
          const size_t at = (first + r) * cols;
          const size_t done =
              sweep_rows(dy + at, x + at, cols, n - r, k0, k1, begun, rows.data() + r, gamma, sums_of_piece, columns);
          for (size_t j = 0; j < done; ++j) partial.data()[(r + j) * pieces + piece] = sums_of_piece[j];
          r += done;
        }
        if (!full || dgamma == nullptr) return;
        for (size_t k = k0; k < k1; ++k) {
          dgamma[k] += static_cast<double>(columns.gamma[k - k0]);
          dbeta[k] += static_cast<double>(columns.beta[k - k0]);
          columns.gamma[k - k0] = columns.beta[k - k0] = A{};
        }
      });
      if (full) summed = 0;
      for (size_t r = 0; r < n; ++r) {
        Sums sum{};
        for (size_t piece = 0; piece < pieces; ++piece) {
          sum.g += partial.data()[r * pieces + piece].g;
          sum.gx += partial.data()[r * pieces + piece].gx;
        }
        if (mean == nullptr) sum.g = 0;
        along.data()[r] = sum;
      }
      const auto write = [&](size_t piece, int) {
        const size_t k0 = piece * kChunk, k1 = std::min(cols, k0 + kChunk);
        Writer<T> writer(plan.stream);
        for (size_t r = n; r-- > 0;) {
          const size_t at = (first + r) * cols;
          write_dx(writer, dy + at, x + at, dx + at, k0, k1, descent(rows.data()[r], along.data()[r], cols), gamma,
                   plan.ahead);
        }
      };
      parallel_for(pieces, write, Order::descending);
    }
  }

  static void backward(const T* dy, const T* x, RowShape shape, const double* mean, const double* var, double eps,
                       const void* gamma_given, T* dx, double* dgamma, double* dbeta) {
    const Parameter<A> gamma(gamma_given, A{1});
    const RowPlan plan = plan_rows(shape, sizeof(T), 2, num_threads());
    const auto pass = plan.team ? long_rows : short_rows;
    pass(dy, x, shape, mean, var, eps, gamma, dx, dgamma, dbeta, plan);
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
