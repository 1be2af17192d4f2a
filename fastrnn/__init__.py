"""Recurrent layers as fast as the machine allows, from one ``pip install`` and no compiler."""

__version__ = "0.1.0"
