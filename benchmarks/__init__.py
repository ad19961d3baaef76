"""Measurements of speed and memory: run by hand or by `make benchmark`, never by the tests."""
