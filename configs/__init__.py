"""Configs that come with vitmed: each file has `get_config(arg)`, and `sweep()` where several runs belong together."""
