"""Adapters to libraries and frameworks, one module each.

Importing an adapter imports its library and is the way to ask for it; importing this package imports nothing.
"""
