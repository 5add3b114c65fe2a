"""The compatibility bench: one story, told to every real server and client version. Not part of the wheel.

`python -m compat` runs it; README.md says how to read what it finds.
"""
