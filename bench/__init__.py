"""The numbers: what tokenscope costs, side by side with its peers. `python -m bench`; see README.md."""
