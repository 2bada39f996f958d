"""The public operations, one file an op: its maths, its validation, its canonical shape, one kernel call."""
