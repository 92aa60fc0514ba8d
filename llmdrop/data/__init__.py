"""Benchmarks and texts without a hub: a mirror of plain files, the packaged data, and the named calibration texts.

Everything here takes a `data_dir`: None (packaged data where there is some, else the hub), "hub", or the directory of a
mirror.
"""
