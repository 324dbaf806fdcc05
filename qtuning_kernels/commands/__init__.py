"""One module per command of the `qtuning` command line."""
