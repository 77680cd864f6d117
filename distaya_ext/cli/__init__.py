"""The command line. One file per command; what takes long to import is imported inside the commands."""
