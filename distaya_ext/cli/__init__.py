"""The command line, one file per command; slow imports happen inside the commands."""
