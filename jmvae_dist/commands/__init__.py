"""One thin module per verb of the command line; each has `main(arguments) -> exit code`."""
