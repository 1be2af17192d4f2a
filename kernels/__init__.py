"""The walks through time, installed as ``fastrnn.kernels``."""
