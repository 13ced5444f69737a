"""TensorRT and TensorRT-RTX: one API, their differences in one table (library.py); engines are built and kept here."""
