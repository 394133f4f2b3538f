"""Experiment configurations, one file a task, each with a `get_config()`."""
