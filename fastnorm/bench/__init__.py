"""Measuring fastnorm: the case table that tests and benchmarks share, the memory floor, the report.

Nothing here is imported by `import fastnorm`. `python -m fastnorm bench` runs the report; the
pytest-benchmark suites of the repository's bench/ use the same cases, variants and checks.

    cases      which op on which shape, layout and dtype, its inputs, the bytes it must move
    variants   the implementations of a case: staged, alt, fused by backend, peers where installed
    check      the float64 reference, errors and tolerances
    roof       the memory floor, measured
    measure    interleaved timing, bursts for what stays in a cache, and peak memory
    run        the report; targets: the run of `--targets`, and the verdicts
"""
