"""What listens to the core's events. Importing ``tokenscope`` attaches `tokenscope.observe.log`, and nothing else."""
